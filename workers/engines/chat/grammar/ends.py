"""Keeps the tokens that would end a choice too early out of masks."""

import numpy as np

from workers.engines.chat.sequence import Sequence


def unwanted_ends(row: Sequence) -> frozenset[int]:
    """The tokens that would end a choice too early, as min_tokens and ignore_eos say."""
    assert row.grammar is not None
    stops, ends = row.sampling.stop_token_ids, row.grammar.ends
    if len(row.output) < row.sampling.min_tokens:
        return stops | ends
    return ends - stops if stops else ends


def exclude_ends(bits: np.ndarray, rows: dict[int, Sequence]) -> None:
    """Remove the unwanted ends of the rows from their masks, by place in bits, int32 [all rows, words]."""
    for at, row in rows.items():
        ends = unwanted_ends(row)
        # seldom any: within a value no end token is allowed
        if any(bits.item(at, token // 32) >> token % 32 & 1 for token in ends):
            exclude(bits[at], ends)


def exclude(bits: np.ndarray, tokens: frozenset[int]) -> None:
    """Remove these tokens from a mask, int32 [words], unless it allows no others."""
    words = bits.view(np.uint32)
    before = bits.copy()
    for token in tokens:
        words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
    if not bits.any():
        bits[:] = before
