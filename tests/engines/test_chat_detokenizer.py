"""Tokens to text: whole characters, no stop string, nothing lost. No model is loaded."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.engines.tiny_chat import make_tokenizer
from workers.engines.chat.detokenizer import ByteStream, Detokenizer, StopMatcher, Vocabulary, WindowStream

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary.of(TOKENIZER)
assert VOCABULARY.table is not None, "the tokenizer wasn't seen to be byte-level"
TABLE = VOCABULARY.table
TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("你好世界👩‍👩‍👧‍👦🇨🇭é́ the fox")), max_size=60
)
TOKENS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)


def decode(tokens: list[int]) -> str:
    return VOCABULARY.decode(tokens)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def drain(detokenizer: Detokenizer, tokens: list[int]) -> tuple[list[str], str | None]:
    """Add all tokens. Returns each piece of text, and the stop string that ended it."""
    pieces = []
    for token in tokens:
        text, stop = detokenizer.add(token)
        pieces.append(text)
        if stop is not None:
            return pieces, stop
    text, stop = detokenizer.flush()
    return [*pieces, text], stop


def streams() -> list[object]:
    return [lambda: ByteStream(TABLE, {}), lambda: WindowStream(decode)]


@pytest.mark.parametrize("make", streams(), ids=["bytes", "window"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_text_arrives_whole_and_never_cut_inside_a_character(make, text):
    pieces, _ = drain(Detokenizer(make()), encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS)
def test_any_tokens_give_what_the_tokenizer_gives(tokens):
    pieces, _ = drain(Detokenizer(ByteStream(TABLE, {})), tokens)
    assert "".join(pieces) == decode(tokens)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.data(),
)
def test_stop_strings_cut_at_their_first_place_however_the_text_is_split(text, stops, cuts):
    places = [text.find(stop) for stop in stops if stop in text]
    matcher, sent, met = StopMatcher(tuple(stops)), "", None
    rest = text
    while rest and met is None:
        size = cuts.draw(st.integers(1, len(rest)))
        piece, met = matcher.add(rest[:size])
        rest = rest[size:]
        sent += piece
        # what was sent contains no stop string, and nothing that later text could complete to one
        assert not any(stop in sent for stop in stops)
    if not places:
        assert met is None
        assert sent + matcher.flush() == text
    else:
        # the first complete stop string ends the text, or one that began before it and ends in the same piece
        assert met is not None
        assert text.startswith(sent + met)
        assert min(places) <= len(sent) <= max(len(text), 0)


def test_held_back_text_is_sent_once_it_can_no_longer_become_a_stop_string():
    matcher = StopMatcher(("END",))
    assert matcher.add("fine E") == ("fine ", None)
    assert matcher.add("N") == ("", None)
    assert matcher.add("ough") == ("ENough", None)
    assert matcher.add(" EN") == (" ", None)
    assert matcher.add("D rest") == ("", "END")


def test_a_stop_string_may_span_tokens_and_characters_of_several_bytes():
    pieces, stop = drain(VOCABULARY.detokenizer(("世界",)), encode("你好世界!"))
    assert ("".join(pieces), stop) == ("你好", "世界")


def test_half_a_character_at_the_end_shows_as_a_replacement_character():
    pieces, _ = drain(VOCABULARY.detokenizer(()), encode("👩")[:-1])
    assert "".join(pieces) == decode(encode("👩")[:-1]) != ""
    assert not any(pieces[:-1])


def test_min_tokens_lets_stop_strings_pass():
    detokenizer = VOCABULARY.detokenizer(("fox",))
    text = "".join(detokenizer.add(token, may_stop=False)[0] for token in encode("a fox"))
    assert text == "a fox"


def test_special_tokens_have_no_text():
    assert decode(encode("a<|end|>b")) == "ab"
    assert drain(VOCABULARY.detokenizer(()), encode("a<|end|>b"))[0] == ["a", "", "b", ""]


def test_a_window_keeps_the_spaces_that_sentencepiece_drops_at_the_start():
    words = ["▁one", "▁two", "▁three"]
    stream = WindowStream(
        lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")
    )
    assert [stream.add(token) for token in (0, 1, 2)] == ["one", " two", " three"]


def test_a_token_of_the_models_padded_vocabulary_has_no_text():
    detokenizer = VOCABULARY.detokenizer(())
    assert detokenizer.add(100_000) == ("", None)


def test_a_window_gives_what_decoding_everything_gives():
    """Uses a decoder as in SentencePiece: words, bytes of other characters, a first space that is dropped.

    The texts are long enough for the window to be shortened many times, also in the middle of runs of bytes.
    """
    words = ["\u2581a", "\u2581fox", "es", "\u2581", ",", "\n"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    made = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    chances = random.Random(4)
    for _ in range(50):
        tokens: list[int] = []
        for _ in range(60):
            if chances.random() < 0.5:
                tokens.append(257 + chances.randrange(len(words)))
            else:
                tokens += [1 + byte for byte in chances.choice("é中文🦊👩\u200d").encode()]
        stream = WindowStream(made.decode)
        gained = [stream.add(token) for token in tokens]
        assert "".join(gained) + stream.flush() == made.decode(tokens)
        assert not any("\ufffd" in text for text in gained)


def test_characters_that_are_never_whole_are_not_held_indefinitely():
    decoded: list[int] = []

    def decode(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return "\ufffd" * len(tokens)

    stream = WindowStream(decode)
    gained = "".join(stream.add(1) for _ in range(1000))
    assert len(gained) >= 995
    assert gained + stream.flush() == "\ufffd" * 1000
    assert max(decoded) < 25, "every token decodes all before it again"


def test_logprobs_tell_tokens_apart_that_decode_to_the_same_text():
    """SentencePiece's spaces and bytes, WordPiece's continuations, special tokens by name."""
    words = ["<s>", "the", "▁the", "<0xE4>", "##the"]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<s>"))
    vocabulary = Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    texts = ["<s>", "the", " the", "\ufffd", "##the"]
    assert [vocabulary.describe(token)[0] for token in range(5)] == texts
    assert vocabulary.describe(3)[1] == [0xE4]


def test_logprobs_name_the_special_tokens_of_a_byte_level_tokenizer():
    assert VOCABULARY.describe(TOKENIZER.eos_token_id)[0] == "<|end|>"
