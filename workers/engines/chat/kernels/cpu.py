"""Inner loops for float32 on a CPU, compiled by numba: attention, norm, rotation, drawing tokens.

torch needs a dozen passes over scores and partial results for attention and a sort of every row for drawing,
and takes the interpreter lock again after each operation. These loops run without the lock (figures:
docs/adr/0004-chat-engine.md). They are in one file because numba's cache is valid until the file changes.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""LLVM's fast-math flags: sums may be reordered, as vector instructions require.

Infinities keep their meaning.
"""

BITS_OF_ONE = np.int32(0x3F800000)
"""The bits of 1.0 in float32. Positive floats are ordered like their bits."""

BLOCK = 128
"""Number of weights that are summed in float32. The sums of these blocks are added in float64."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call.

    The machine code is cached in __pycache__, or wherever numba may write.
    """
    try:
        return numba.njit(function, cache=True, nogil=True, fastmath=REORDERED)
    except RuntimeError:
        # no place for the cache: compiling takes two seconds at every start of a worker
        return numba.njit(function, nogil=True, fastmath=REORDERED)


@compiled
def exclude_tokens(logits: Any, places: Any, allowed: Any) -> None:
    """Set logits[places] to -inf where a bit of `allowed` is 0.

    logits [rows, vocabulary]; allowed int32 [places, words].
    """
    vocabulary = logits.shape[1]
    for row in range(len(places)):
        own = logits[places[row]]
        for word in range(-(-vocabulary // 32)):
            bits = allowed[row, word]
            if bits == -1:
                continue
            start, end = 32 * word, min(32 * word + 32, vocabulary)
            if bits == 0:
                own[start:end] = -np.inf
                continue
            for token in range(start, end):
                if not (bits >> (token - start)) & 1:
                    own[token] = -np.inf


@compiled
def store_in_pages(key: Any, value: Any, pages: Any, offsets: Any, keys: Any, values: Any) -> None:
    """Write key, value [tokens, kv_heads, head_dim] to keys, values[pages[token], :, offsets[token]]."""
    tokens, kv_heads, head_dim = key.shape
    for token in range(tokens):
        page, offset = pages[token], offsets[token]
        for head in range(kv_heads):
            for at in range(head_dim):
                keys[page, head, offset, at] = key[token, head, at]
                values[page, head, offset, at] = value[token, head, at]


@numba.njit(nogil=True, fastmath=REORDERED | {"nnan"})
def _largest(row: Any, count: int) -> Any:
    # vector instructions need "nnan" here: no NaN is expected, and after one no result is right anyway
    best = row[0]
    for at in range(count):
        best = row[at] if row[at] > best else best
    return best


@compiled
def exp_of_differences(row: Any, count: int, scale: Any) -> Any:
    """Replace row[:count] by exp(scale * (row - its maximum)). Returns the sum.

    exp(x) = 2^k e^r with |r| <= ln(2)/2. For e^r a polynomial of degree 6 is exact to float32's rounding, and
    unlike a call of the library's exp it compiles to vector instructions.
    """
    best = _largest(row, count)
    # a product, because a division would be checked for zero, which rules out vector instructions
    scale_to_bits = np.float32(scale * 1.4426950408889634)
    exponents = np.empty(count, np.int32)
    powers = exponents.view(np.float32)
    for at in range(count):
        # 2^-127 is no normal float32: numbers so far below the maximum, and -inf, become 0
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
    """Attention of one query for each row over its pages. Writes out, float32 [rows, heads, head_dim].

    query [rows, heads, head_dim]; keys, values [pages, kv_heads, page_size, head_dim]; tables [rows, most
    pages of a row]; ends [rows]: number of keys that the row sees. window, softcap: 0 for none.
    """
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
    """Root mean square norm of each row of x [rows, width] (Zhang and Sennrich 2019). Writes out, like x."""
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
    """Rotary position embedding.

    Writes out [tokens, heads, head_dim] from the first heads of joined [tokens, more, head_dim].

    cos, sin [positions, head_dim / 2]. The pairs are (at, at + head_dim / 2), as in transformers.
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
    logits: Any,
    drawn: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    uniforms: Any,
    tokens: Any,
) -> None:
    """Draw a token for each of the rows `drawn` of logits [rows, vocabulary]. These rows are overwritten.

    All other arrays are [drawn rows]. Writes tokens.

    In transformers' order: temperature, top_k (0: all), top_p within these (1: all), min_p. The token is the
    one at which the cumulative weight of the remaining tokens, in the order of the vocabulary, exceeds
    uniforms[row] of their sum.
    """
    vocabulary = logits.shape[1]
    for row in range(len(drawn)):
        weights = logits[drawn[row]]
        exp_of_differences(weights, vocabulary, np.float32(1) / temperature[row])
        least = np.float32(min_p[row])
        if 0 < top_k[row] < vocabulary or top_p[row] < 1:
            least = max(least, _smallest_kept(weights, top_k[row], top_p[row]))
        tokens[row] = _pick(weights, least, uniforms[row])


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
