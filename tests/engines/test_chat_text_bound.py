"""The bound on a text's number of tokens: never above the true number, even where the tokenizer drops or
joins."""

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engines.tiny_chat import make_tokenizer
from workers.engines.chat.text_bound import TextBound

TEXTS = {
    "words": "the quick brown fox " * 50,
    "spaces": " " * 5000,
    "spaces after a token": "<|user|>" + " \n" * 5000 + "hello",
    "accents": "\u03b9\u0308\u0301" * 2000,
    "unknown characters": "\u4f60" * 5000,
    "capitals": "\u0130" * 1000,
}


def by_byte(**parts: Any) -> PreTrainedTokenizerFast:
    """Make the tokenizer of the tiny models with other steps before its model."""
    tokenizer = make_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def of_model(model: Any, **parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stripping() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", rstrip=True, special=True)], special_tokens=True)
    return tokenizer


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
BOUNDED = {
    "byte level": make_tokenizer(),
    "composing": of_model(
        models.BPE({character: at for at, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []),
        normalizer=normalizers.NFC(),
        pre_tokenizer=BYTE_LEVEL,
    ),
    "split": by_byte(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), BYTE_LEVEL])
    ),
    "stripping": stripping(),
    "byte fallback": of_model(
        models.BPE(
            BYTES | {"\u2581": 256, "<unk>": 257}, [], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    ),
}
UNBOUNDED = {
    "collapsing": by_byte(normalizer=normalizers.Replace(Regex(r"\s+"), " ")),
    "shortening": by_byte(normalizer=normalizers.Replace("the quick brown", "t")),
    "removing": by_byte(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTE_LEVEL])
    ),
    "compatibility": by_byte(normalizer=normalizers.NFKC()),
    "words": of_model(models.WordLevel({"the": 0, "?": 1}, "?"), pre_tokenizer=pre_tokenizers.Whitespace()),
    "dropping": of_model(models.BPE({"t": 0, "h": 1, "th": 2}, [("t", "h")])),
    "joining": of_model(models.BPE({"t": 0, "?": 1}, [], unk_token="?", fuse_unk=True)),
    "unigram": of_model(models.Unigram([("?", 0.0), ("the", -1.0)], 0, False)),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*BOUNDED, *UNBOUNDED])
def test_a_text_has_at_least_as_many_tokens(name, text):
    tokenizer = (BOUNDED | UNBOUNDED)[name]
    tokens = len(tokenizer(TEXTS[text], add_special_tokens=False)["input_ids"])
    assert TextBound(tokenizer).tokens(TEXTS[text]) <= tokens


@pytest.mark.parametrize("name", BOUNDED)
def test_a_tokenizer_that_keeps_every_character_has_a_bound(name):
    tokenizer = BOUNDED[name]
    longest = max(map(len, tokenizer.get_vocab()))
    assert TextBound(tokenizer).tokens("x" * 100_000) == -(-100_000 // longest)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_tokenizer_that_may_drop_characters_has_none(name):
    assert TextBound(UNBOUNDED[name]).tokens("x" * 100_000) == 0
