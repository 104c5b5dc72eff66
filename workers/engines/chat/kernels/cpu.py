"""The engine's inner loops as machine code, for a CPU in float32: attention over pages, and the choice of tokens.

torch needs a dozen passes over scores and partial results for the one, a sort of every row for the other, and hands the
interpreter lock back and forth in each. These loops hold no lock (ADR 0004 has the figures). They stand in one file,
since numba keeps what it compiled until the file that holds it changes.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, which vector instructions need; infinities keep their meaning."""

BITS_OF_ONE = np.int32(0x3F800000)
"""float32's 1.0. Bits of positive floats order as the floats do."""

BLOCK = 128
"""Weights that are summed in float32, before their sums are added in float64."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code, kept beside this file from its first call on, or wherever numba may write."""
    try:
        return numba.njit(function, cache=True, nogil=True, fastmath=REORDERED)
    except RuntimeError:
        # nowhere to write: every start of a worker compiles for two seconds
        return numba.njit(function, nogil=True, fastmath=REORDERED)


@compiled
def store_in_pages(key: Any, value: Any, pages: Any, offsets: Any, keys: Any, values: Any) -> None:
    """key, value [tokens, kv_heads, head_dim] to keys, values[pages[token], :, offsets[token]]."""
    tokens, kv_heads, head_dim = key.shape
    for token in range(tokens):
        page, offset = pages[token], offsets[token]
        for head in range(kv_heads):
            for at in range(head_dim):
                keys[page, head, offset, at] = key[token, head, at]
                values[page, head, offset, at] = value[token, head, at]


@numba.njit(nogil=True, fastmath=REORDERED | {"nnan"})
def _largest(row: Any, count: int) -> Any:
    # a maximum is taken of many numbers at once only where none is known to be NaN; if one is, no result is right
    best = row[0]
    for at in range(count):
        best = row[at] if row[at] > best else best
    return best


@compiled
def exp_of_differences(row: Any, count: int, scale: Any) -> Any:
    """row[:count] becomes exp(scale * (row - its maximum)). Returns the sum.

    exp(x) = 2^k e^r with |r| <= ln(2)/2: a polynomial of degree 6 is exact to float32's rounding, and unlike a call of
    the library's exp it is done for many numbers at once.
    """
    best = _largest(row, count)
    # division by 1 / scale would be checked for zero, which vector instructions can't
    scale_to_bits = np.float32(scale * 1.4426950408889634)
    exponents = np.empty(count, np.int32)
    powers = exponents.view(np.float32)
    for at in range(count):
        # 2^-127 has no bits of its own: what is that far below the best, or forbidden by -inf, becomes 0
        scaled = max((row[at] - best) * scale_to_bits, np.float32(-127))
        whole = np.floor(scaled + np.float32(0.5))
        exponents[at] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        r = (scaled - whole) * np.float32(0.6931471805599453)
        e = r * np.float32(1 / 720) + np.float32(1 / 120)
        e = e * r + np.float32(1 / 24)
        e = e * r + np.float32(1 / 6)
        e = e * r + np.float32(0.5)
        e = e * r + np.float32(1)
        row[at] = e * r + np.float32(1)
    total = np.float32(0)
    for at in range(count):
        row[at] *= powers[at]
        total += row[at]
    return total


@compiled
def decode_rows(
    query: Any,
    keys: Any,
    values: Any,
    tables: Any,
    ends: Any,
    scale: Any,
    window: int,
    softcap: Any,
    out: Any,
) -> None:
    """One query [heads, head_dim] for each row, over the pages tables[row] up to key ends[row]; 0: no window, no softcap."""
    rows, heads, head_dim = query.shape
    kv_heads, page_size = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    longest = 0
    for row in range(rows):
        longest = max(longest, ends[row])
    scores = np.empty((heads, longest), np.float32)
    for row in range(rows):
        end = ends[row]
        first = max(0, end - window) if window > 0 else 0
        for page in range(first // page_size, (end - 1) // page_size + 1):
            block, start = keys[tables[row, page]], page * page_size
            low, high = max(first, start), min(end, start + page_size)
            for kv_head in range(kv_heads):
                for place in range(low, high):
                    for head in range(kv_head * group, kv_head * group + group):
                        score = np.float32(0)
                        for at in range(head_dim):
                            score += query[row, head, at] * block[kv_head, place - start, at]
                        scores[head, place - first] = score * scale
        for head in range(heads):
            if softcap > 0:
                for place in range(end - first):
                    scores[head, place] = softcap * math.tanh(scores[head, place] / softcap)
            share = np.float32(1) / exp_of_differences(scores[head], end - first, np.float32(1))
            for place in range(end - first):
                scores[head, place] *= share
            for at in range(head_dim):
                out[row, head, at] = 0
        for page in range(first // page_size, (end - 1) // page_size + 1):
            block, start = values[tables[row, page]], page * page_size
            low, high = max(first, start), min(end, start + page_size)
            for head in range(heads):
                for place in range(low, high):
                    weight = scores[head, place - first]
                    for at in range(head_dim):
                        out[row, head, at] += weight * block[head // group, place - start, at]


@compiled
def normalize(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Root mean square norm of each row of x [rows, width] (Zhang and Sennrich 2019)."""
    rows, width = x.shape
    for row in range(rows):
        squares = np.float32(0)
        for at in range(width):
            squares += x[row, at] * x[row, at]
        scale = np.float32(1 / math.sqrt(squares / width + eps))
        for at in range(width):
            out[row, at] = x[row, at] * scale * weight[at]


@compiled
def rotate_heads(joined: Any, cos: Any, sin: Any, positions: Any, out: Any) -> None:
    """Rotary position embedding of the first heads of joined [tokens, heads, head_dim], as many as out has.

    cos, sin [positions, head_dim / 2]: pairs are (at, at + head_dim / 2), as transformers has them.
    """
    tokens, heads, head_dim = out.shape
    half = head_dim // 2
    for token in range(tokens):
        position = positions[token]
        for head in range(heads):
            for at in range(half):
                first, second = joined[token, head, at], joined[token, head, half + at]
                c, s = cos[position, at], sin[position, at]
                out[token, head, at] = first * c - second * s
                out[token, head, half + at] = second * c + first * s


@compiled
def draw_tokens(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, uniforms: Any, tokens: Any
) -> None:
    """One token for each row of logits [rows, vocabulary], which are spoilt; everything else is [rows].

    In transformers' order: temperature, top_k (0: all), top_p within these (1: all), min_p. The token is where the
    cumulative weight of what is left, in the order of the vocabulary, passes uniforms[row] of the whole.
    """
    rows, vocabulary = logits.shape
    for row in range(rows):
        weights = logits[row]
        exp_of_differences(weights, vocabulary, np.float32(1) / temperature[row])
        least = np.float32(min_p[row])
        if 0 < top_k[row] < vocabulary or top_p[row] < 1:
            least = max(least, _smallest_kept(weights, top_k[row], top_p[row]))
        tokens[row] = _pick(weights, least, uniforms[row])


@compiled
def _pick(weights: Any, least: Any, uniform: float) -> int:
    """The place where the cumulative weight of those >= least passes `uniform` of their sum.

    By sums of blocks first: adding one by one would be most of the work.
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
            # the last one stands where rounding leaves the sum short
            picked = at
            passed += weights[at]
            if passed > point:
                break
    return picked


@compiled
def _smallest_kept(weights: Any, top_k: Any, top_p: Any) -> Any:
    """A bound that those weights reach which top_k and then top_p let through. weights: in [0, 1], the best is 1."""
    kept = np.float32(0)
    total = _amount_above(weights, kept, False)
    if 0 < top_k < len(weights):
        kept = _bound(weights, kept, top_k, True)
        # of equals at the bound as many count for top_p as top_k has room for
        surplus = _amount_above(weights, kept, True) - top_k
        total = _amount_above(weights, kept, False) - surplus * kept
    if top_p < 1:
        kept = _bound(weights, kept, top_p * total, False)
    return kept


@compiled
def _bound(weights: Any, low: Any, goal: Any, counted: bool) -> Any:
    """The largest bound, not below `low`, that weights reach whose number (counted) or sum is at least `goal`.

    Halves the interval in which it lies, in bits. Each look at all weights is a few hundred vector instructions, so
    that some fifteen of them take less time than one sort or one count into buckets, which go number by number.
    """
    bound = np.empty(2, np.float32)
    bits = bound.view(np.int32)
    bound[0] = low
    bits[1] = BITS_OF_ONE + 1
    at_low, at_high = _amount_above(weights, low, counted), np.float64(0)
    # until a single weight is left between them: two would weigh twice the bound at least, save for rounding
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
    """The number (counted) or the sum of the weights >= least, float64."""
    total = np.float64(0)
    for start in range(0, len(weights), BLOCK):
        total += _amount_in_block(weights[start : start + BLOCK], least, counted)
    return total


@compiled
def _amount_in_block(block: Any, least: Any, counted: bool) -> Any:
    # handed over as a slice: an index that might be negative keeps the loop from vector instructions
    total = np.float32(0)
    if counted:
        for at in range(len(block)):
            total += np.float32(1) if block[at] >= least else np.float32(0)
    else:
        for at in range(len(block)):
            total += block[at] if block[at] >= least else np.float32(0)
    return total
