"""Keeps the tokens that would end a choice too early out of masks."""

from collections import defaultdict

import numpy as np

from workers.engines.chat.sequence import Sequence


def unwanted_ends(row: Sequence) -> frozenset[int]:
    """The tokens that would end a choice too early, as min_tokens and ignore_eos say."""
    assert row.grammar is not None
    stops, ends = row.sampling.stop_token_ids, row.grammar.ends
    return stops | ends if len(row.output) < row.sampling.min_tokens else ends - stops


def exclude_ends(bits: np.ndarray, rows: dict[int, Sequence]) -> None:
    """Remove the unwanted ends of the rows from their masks, by place in bits, int32 [all rows, words]."""
    places_of_ends: defaultdict[frozenset[int], list[int]] = defaultdict(list)
    for at, row in rows.items():
        places_of_ends[unwanted_ends(row)].append(at)
    for ends, places in places_of_ends.items():
        for at in _with_any(ends, bits, places):
            exclude(bits[at], ends)


def _with_any(tokens: frozenset[int], bits: np.ndarray, rows: list[int]) -> list[int]:
    """Return those of the rows whose mask allows one of the tokens; bits int32 [all rows, words].

    Seldom any, since within a value no end token is allowed, so this looks at all rows at once.
    """
    own = np.array(sorted(tokens), np.int64)
    found = bits.view(np.uint32)[np.ix_(np.array(rows), own // 32)] >> (own % 32).astype(np.uint32) & 1
    return [rows[at] for at in np.flatnonzero(found.any(1))]


def exclude(bits: np.ndarray, tokens: frozenset[int]) -> None:
    """Remove these tokens from a mask, int32 [words], unless it allows no others."""
    words = bits.view(np.uint32)
    before = bits.copy()
    for token in tokens:
        words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
    if not bits.any():
        bits[:] = before
