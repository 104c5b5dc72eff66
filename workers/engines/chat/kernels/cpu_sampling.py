"""Inner loops for sampling on a CPU, compiled by numba: what grammars allow, the best token, drawing tokens.

torch needs a sort of every row for drawing. numba doesn't see a change of what is imported here: such
a change must touch this file, too.
"""

from typing import Any

import numba
import numpy as np

from workers.engines.chat.kernels.cpu import compiled, exp_below, largest_of
from workers.engines.chat.kernels.instructions import REORDERED, count_ones

BITS_OF_ONE = np.int32(0x3F800000)
"""The bits of 1.0 in float32. Positive floats are ordered like their bits."""

BLOCK = 128
"""Number of weights that are summed in float32. The sums of these blocks are added in float64."""


FEW = 8
"""Where a mask allows at most the vocabulary / FEW tokens, these are gathered: less work than a whole row."""

BIT_OF = np.zeros(37, np.int32)
"""The number of a bit, by its value modulo 37: all 32 differ."""
BIT_OF[[(1 << bit) % 37 for bit in range(32)]] = np.arange(32)


@compiled
def count_bits(words: Any, counts: Any) -> None:
    """Write how many bits of each row are 1. words uint32 [rows, words], counts int64 [rows]."""
    for row in range(len(words)):
        total = 0
        for word in words[row]:
            total += count_ones(word)
        counts[row] = total


@compiled
def best_tokens(logits: Any, places: Any, mask_of: Any, allowed: Any, counts: Any, tokens: Any) -> None:
    """Find, for each of the rows `places`, the token with the greatest logit that its mask allows.

    All but `places`: as for `draw_tokens`.
    """
    ids = np.zeros(max(1, logits.shape[1] // FEW), np.int32)
    for at in range(len(places)):
        row, mask = logits[places[at]], mask_of[places[at]]
        if counts[mask] <= len(ids):
            count = _gather(row, allowed[mask], ids)
            best = 0
            for other in range(1, count):
                best = other if row[other] > row[best] else best
            tokens[at] = ids[best]
        else:
            _, tokens[at] = _exclude(row, allowed[mask])


@compiled
def draw_tokens(
    logits: Any,
    drawn: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    uniforms: Any,
    mask_of: Any,
    allowed: Any,
    counts: Any,
    tokens: Any,
) -> None:
    """Draw a token for each of the rows `drawn` of logits [rows, vocabulary]. These rows are overwritten.

    mask_of int64 [rows]: which of the masks `allowed`, int32 [masks, words], says what a row may have; -1:
    none. counts int64 [masks]: how many tokens they allow. All other arrays are [drawn rows]. Writes tokens.

    In transformers' order: temperature, top_k (0: all), top_p within these (1: all), min_p. The token is the
    one at which the cumulative weight of the remaining tokens, in the order of the vocabulary, exceeds
    uniforms[row] of their sum.
    """
    ids = np.zeros(max(1, logits.shape[1] // FEW), np.int32)
    for row in range(len(drawn)):
        weights, mask = logits[drawn[row]], mask_of[drawn[row]]
        gathered = mask >= 0 and counts[mask] <= len(ids)
        if gathered:
            # a mask that allows none gives token 0, which its grammar then refuses
            weights = weights[: max(1, _gather(weights, allowed[mask], ids))]
        if gathered or mask < 0:
            largest = largest_of(weights, len(weights))
        else:
            largest, _ = _exclude(weights, allowed[mask])
        exp_below(weights, len(weights), largest, np.float32(1) / temperature[row])
        least = np.float32(min_p[row])
        if 0 < top_k[row] < len(weights) or top_p[row] < 1:
            least = max(least, _smallest_kept(weights, top_k[row], top_p[row]))
        picked = _pick(weights, least, uniforms[row])
        tokens[row] = ids[picked] if gathered else picked


@compiled
def _gather(row: Any, words: Any, ids: Any) -> int:
    """Write which tokens a mask allows to `ids`, in order, and their logits to the row's beginning.

    Returns how many they are.
    """
    found = 0
    for word in range(len(words)):
        bits = np.uint32(words[word])
        while bits:
            lowest = bits & (np.uint32(0) - bits)
            token = 32 * word + BIT_OF[lowest % np.uint32(37)]
            # a mask may have more bits than there are logits
            if token < len(row):
                ids[found] = token
                row[found] = row[token]
                found += 1
            bits ^= lowest
    return found


@numba.njit(nogil=True, fastmath=REORDERED | {"nnan"})
def _exclude(row: Any, words: Any) -> Any:
    """Set row [vocabulary] to -inf where a bit of `words` is 0. Returns the largest left, and its place."""
    # "nnan" as in largest_of
    largest, within = np.float32(-np.inf), 0
    whole = len(row) // 32
    for word in range(whole):
        bits = words[word]
        # a slice, because an index that might be negative rules out vector instructions
        part = row[32 * word : 32 * word + 32]
        if bits != -1:
            for at in range(32):
                part[at] = part[at] if (bits >> np.int32(at)) & np.int32(1) else np.float32(-np.inf)
        best = part[0]
        for at in range(32):
            best = part[at] if part[at] > best else best
        if best > largest:
            largest, within = best, 32 * word
    for token in range(32 * whole, len(row)):
        if not (words[whole] >> np.int32(token - 32 * whole)) & np.int32(1):
            row[token] = -np.inf
        elif row[token] > largest:
            largest, within = row[token], token
    for token in range(within, min(within + 32, len(row))):
        if row[token] == largest:
            return largest, token
    return largest, within


@compiled
def _pick(weights: Any, least: Any, uniform: float) -> int:
    """Return the index at which the cumulative sum of the weights >= least exceeds `uniform` of their sum.

    Sums of blocks find the right block first: adding all weights one by one would be most of the work.
    """
    count = len(weights)
    sums = np.empty(-(-count // BLOCK), np.float64)
    for block in range(len(sums)):
        sums[block] = _amount_in_block(weights[block * BLOCK : block * BLOCK + BLOCK], least, False)
    point, passed, block = uniform * sums.sum(), 0.0, 0
    while block < len(sums) - 1 and passed + sums[block] <= point:
        passed += sums[block]
        block += 1
    picked = 0
    for at in range(block * BLOCK, min(count, block * BLOCK + BLOCK)):
        if weights[at] > 0 and weights[at] >= least:
            # the last one is the result if rounding leaves the sum short
            picked = at
            passed += weights[at]
            if passed > point:
                break
    return picked


@compiled
def _smallest_kept(weights: Any, top_k: Any, top_p: Any) -> Any:
    """Return the smallest weight that passes top_k and then top_p. weights: in [0, 1], the largest is 1."""
    kept = np.float32(0)
    total = _amount_above(weights, kept, False)
    if 0 < top_k < len(weights):
        kept = _bound(weights, kept, top_k, True)
        # of several weights equal to the bound, top_p counts only as many as top_k has room for
        surplus = _amount_above(weights, kept, True) - top_k
        total = _amount_above(weights, kept, False) - surplus * kept
    if top_p < 1:
        kept = _bound(weights, kept, top_p * total, False)
    return kept


@compiled
def _bound(weights: Any, low: Any, goal: Any, counted: bool) -> Any:
    """Return the largest bound >= low that enough weights reach.

    Enough: the weights >= bound have a number (counted) or a sum of at least `goal`. Bisects the interval of
    the bound's bits. Each pass over all weights is a few hundred vector instructions, so about fifteen passes
    take less time than one sort or one count into buckets, which proceed number by number.
    """
    bound = np.empty(2, np.float32)
    bits = bound.view(np.int32)
    bound[0] = low
    bits[1] = BITS_OF_ONE + 1
    at_low, at_high = _amount_above(weights, low, counted), np.float64(0)
    # until a single weight is left in the interval: but for rounding, two weigh at least twice the bound
    while bits[1] - bits[0] > 1 and at_low - at_high > 1.5 * (1 if counted else bound[0]):
        low_bits = bits[0]
        bits[0] = (low_bits + bits[1]) >> 1
        amount = _amount_above(weights, bound[0], counted)
        if amount >= goal:
            at_low = amount
        else:
            at_high = amount
            bits[1] = bits[0]
            bits[0] = low_bits
    return bound[0]


@compiled
def _amount_above(weights: Any, least: Any, counted: bool) -> Any:
    """Return the number (counted) or the sum of the weights >= least, as float64."""
    total = np.float64(0)
    for start in range(0, len(weights), BLOCK):
        total += _amount_in_block(weights[start : start + BLOCK], least, counted)
    return total


@compiled
def _amount_in_block(block: Any, least: Any, counted: bool) -> Any:
    # takes a slice, because an index that might be negative rules out vector instructions
    total = np.float32(0)
    if counted:
        for at in range(len(block)):
            total += np.float32(1) if block[at] >= least else np.float32(0)
    else:
        for at in range(len(block)):
            total += block[at] if block[at] >= least else np.float32(0)
    return total
