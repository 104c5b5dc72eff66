"""A real chat model whose answers are written beforehand, for tests of what the service makes of an answer.

Each token is followed by one certain other token: the weights are a table. The content of the last message
names the script, whose first token the chat template writes at the end of the prompt.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workers.engines.chat.detokenizer import _byte_characters

END = "<|im_end|>"
SHORTEST = 3
"""Characters of a script's shortest token."""

BEGIN = "{%- if add_generation_prompt -%}{{ '<|script:' ~ messages[-1].content ~ '|>' }}{%- endif -%}"


def save_scripted_model(
    folder: Path,
    template: str,
    scripts: Mapping[str, str | Sequence[str]],
    special: Sequence[str] = (),
    opening: str = "",
) -> Path:
    """Save a model that answers a last message `name` with `scripts[name]`, a text or its tokens.

    `special`: texts in the scripts that are special tokens. Each may occur once in all scripts, since what
    follows depends on the token alone. `opening`: one of them with which every prompt ends; there is one
    script then.
    """
    chains: dict[str, list[str]] = {}
    used: set[str] = set()
    for name, script in scripts.items():
        if isinstance(script, str):
            chain = list(_tokens(opening + script, special, used))
        else:
            chain = list(script)
            assert not used.intersection(chain), f"a token of {chain} occurs twice"
            used.update(chain)
        chains[f"<|script:{name}|>"] = chain
    spell = _byte_characters()

    def spelled(piece: str) -> str:
        return "".join(spell[byte] for byte in piece.encode())

    texts = (spelled(piece) for chain in chains.values() for piece in chain if piece not in special)
    pieces = dict.fromkeys([*spell.values(), *texts])
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=["<|im_start|>", *chains, *special],
        chat_template=template + BEGIN.replace("'|>'", f"'|>{opening}'"),
        clean_up_tokenization_spaces=False,
    )
    ids = made.get_vocab()
    follows = dict.fromkeys(ids.values(), ids[END])
    for begin, chain in chains.items():
        tokens = [ids[piece if piece in special else spelled(piece)] for piece in chain]
        follows |= dict(pairwise([ids[begin], *tokens, ids[END]]))
    made.save_pretrained(folder)
    _save_weights(folder, follows)
    return folder


def _tokens(script: str, special: Sequence[str], used: set[str]) -> Iterator[str]:
    """Cut a script into tokens that are not in `used`, and add them to it."""
    for segment in re.split(f"({'|'.join(map(re.escape, special))})", script) if special else [script]:
        if segment in special:
            assert segment not in used, f"{segment} occurs twice"
            used.add(segment)
            yield segment
        else:
            yield from _cut(segment, used)


def _cut(segment: str, used: set[str]) -> list[str]:
    pieces: list[str] = []
    at = 0
    while at < len(segment):
        sizes = range(SHORTEST, len(segment) - at + 1)
        size = next((size for size in sizes if segment[at : at + size] not in used), len(segment) - at)
        piece = segment[at : at + size]
        at += size
        # the rest can be short, or in use
        while piece in used or (len(piece) < SHORTEST and pieces):
            assert pieces, f"{piece!r} occurs twice"
            piece = pieces.pop() + piece
        used.add(piece)
        pieces.append(piece)
    return pieces


def _save_weights(folder: Path, follows: Mapping[int, int]) -> None:
    """Save a Llama of one layer that adds nothing: its logits are a table of the token that comes next."""
    size = -(-len(follows) // 64) * 64
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=size // 64,
        max_position_embeddings=4096,
        eos_token_id=follows[0],
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for token, following in follows.items():
            model.lm_head.weight[following, token] = 1
    model.generation_config = GenerationConfig(eos_token_id=follows[0], pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
