"""Inner loops for float32 on a CPU, compiled by numba: attention over pages, norm, rotation.

torch needs a dozen passes over scores and partial results for attention, and takes the interpreter lock again
after each operation. These loops run without the lock (figures: docs/adr/0004-chat-engine.md). numba's cache
of a function is valid until its file changes, even if a function that it calls has changed: a change of
instructions.py must touch this file, too.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from workers.engines.chat.kernels.instructions import (
    REORDERED,
    prefetch,
    tile_1x8,
    tile_1x16,
    tile_2x8,
    tile_2x16,
    tile_3x8,
    tile_3x16,
    tile_4x8,
    tile_4x16,
)

CACHE_LINE = 64
"""Bytes that are loaded together, on x86-64 and most ARM64 processors."""


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
def store_in_pages(key: Any, value: Any, pages: Any, offsets: Any, keys: Any, values: Any) -> None:
    """Write the bits of float32 key, value, uint32 [tokens, kv_heads, head_dim], to pages[token].

    keys [pages, kv_heads, head_dim, page_size], values [pages, kv_heads, page_size, head_dim], at
    offsets[token]: the bits of float32, uint32, or of bfloat16, uint16, rounded to the nearest and half to
    even.
    """
    tokens, kv_heads, head_dim = key.shape
    shift = np.uint32(32 - 8 * keys.itemsize)
    half = np.uint32((1 << shift) >> 1)
    for token in range(tokens):
        page, offset = pages[token], offsets[token]
        for head in range(kv_heads):
            for at in range(head_dim):
                keys[page, head, at, offset] = _shorten(key[token, head, at], shift, half)
            for at in range(head_dim):
                values[page, head, offset, at] = _shorten(value[token, head, at], shift, half)


@numba.njit(nogil=True)
def _shorten(bits: Any, shift: Any, half: Any) -> Any:
    """Round away the last `shift` bits, 0 or 16. `half`: 0, or half of the lowest bit that stays."""
    if half:
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            # rounding could make a number of a NaN
            return np.uint32(0x7FC00000) >> shift
        bits += half - np.uint32(1) + ((bits >> shift) & np.uint32(1))
    return bits >> shift


@numba.njit(nogil=True, fastmath=REORDERED | {"nnan"})
def largest_of(row: Any, count: int) -> Any:
    # vector instructions need "nnan" here: no NaN is expected, and after one no result is right anyway
    best = row[0]
    for at in range(count):
        best = row[at] if row[at] > best else best
    return best


@compiled
def exp_of_differences(row: Any, count: int, scale: Any) -> Any:
    """Replace row[:count] by exp(scale * (row - its maximum)). Returns the sum."""
    return exp_below(row, count, largest_of(row, count), scale)


@numba.njit(nogil=True, fastmath=REORDERED, inline="always")
def exp_below(row: Any, count: int, best: Any, scale: Any) -> Any:
    """Replace row[:count] by exp(scale * (row - best)), where no number exceeds `best`. Returns the sum.

    exp(x) = 2^k e^r with |r| <= ln(2)/2. For e^r a polynomial of degree 6 is exact to float32's rounding, and
    unlike a call of the library's exp it compiles to vector instructions.
    """
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
def add_product(weights: Any, vectors: Any, out: Any) -> None:
    """out += weights @ vectors, float32 [rows, length] and [length, columns]; columns: a multiple of 8.

    `vectors` may be the bits of bfloat16, uint16. The items of a row are contiguous. length is at least 1.
    """
    rows, columns = out.shape
    for row in range(0, rows, 4):
        own, left = weights[row:], rows - row
        for column in range(0, columns, 16):
            part, sums = vectors[:, column:], out[row:, column:]
            if columns - column >= 16:
                if left >= 4:
                    tile_4x16(own, part, sums)
                elif left == 3:
                    tile_3x16(own, part, sums)
                elif left == 2:
                    tile_2x16(own, part, sums)
                else:
                    tile_1x16(own, part, sums)
            elif left >= 4:
                tile_4x8(own, part, sums)
            elif left == 3:
                tile_3x8(own, part, sums)
            elif left == 2:
                tile_2x8(own, part, sums)
            else:
                tile_1x8(own, part, sums)


@numba.njit(nogil=True)
def _prefetch_head(pages: Any, page: Any, head: Any) -> None:
    """Begin to load the part of one head in a page, of [pages, kv_heads, two contiguous dimensions]."""
    for offset in range(0, pages.strides[1], CACHE_LINE):
        prefetch(pages, np.intp(page), np.intp(head), np.intp(offset))


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

    query [rows, heads, head_dim]; keys [pages, kv_heads, head_dim, page_size] and values [pages, kv_heads,
    page_size, head_dim], both float32 or the bits of bfloat16, uint16; tables [rows, most pages of a row];
    ends [rows]: number of keys that the row sees. window, softcap: 0 for none. page_size and head_dim are
    multiples of 8.

    While a head's part of a page is read, that of the next page is loaded: where it lies only the table
    tells, and without that each page would begin with a wait for memory.
    """
    rows, heads, head_dim = query.shape
    kv_heads, page_size = values.shape[1], values.shape[2]
    group = heads // kv_heads
    scores = np.empty((heads, tables.shape[1] * page_size), np.float32)
    scaled = np.empty((heads, head_dim), np.float32)
    for row in range(rows):
        end = ends[row]
        first = max(0, end - window) if window > 0 else 0
        first_page, end_page = first // page_size, -(-end // page_size)
        # places in `scores` count from the first page that is seen
        start = first_page * page_size
        next_first = 0
        if row + 1 < rows and window > 0:
            next_first = max(0, ends[row + 1] - window) // page_size
        low, high = first - start, end - start
        scaled[:] = query[row] * scale
        scores[:, : end_page * page_size - start] = np.float32(0)
        for number in range(first_page, end_page):
            block, place = keys[tables[row, number]], number * page_size - start
            for kv_head in range(kv_heads):
                if number + 1 < end_page:
                    _prefetch_head(keys, tables[row, number + 1], kv_head)
                else:
                    _prefetch_head(values, tables[row, first_page], kv_head)
                own = slice(kv_head * group, kv_head * group + group)
                add_product(scaled[own], block[kv_head], scores[own, place : place + page_size])
        out[row] = 0
        for head in range(heads):
            seen = scores[head, low:high]
            if softcap > 0:
                for at in range(high - low):
                    seen[at] = softcap * math.tanh(seen[at] / softcap)
            share = np.float32(1) / exp_of_differences(seen, high - low, np.float32(1))
            for at in range(high - low):
                seen[at] *= share
        for number in range(first_page, end_page):
            block, place = values[tables[row, number]], number * page_size - start
            begin, stop = max(low - place, 0), min(high - place, page_size)
            for kv_head in range(kv_heads):
                if number + 1 < end_page:
                    _prefetch_head(values, tables[row, number + 1], kv_head)
                elif row + 1 < rows:
                    _prefetch_head(keys, tables[row + 1, next_first], kv_head)
                own = slice(kv_head * group, kv_head * group + group)
                weights = scores[own, place + begin : place + stop]
                add_product(weights, block[kv_head, begin:stop], out[row, own])


BLOCK = 128
"""Number of logits that are looked at together, in vector instructions."""


@compiled
def refine(logits: Any, x: Any, weight: Any) -> None:
    """Compute those logits again that rounding may have put below or above the greatest one, in place.

    logits float32 [rows, vocabulary], rounded to bfloat16; x float32 [rows, width]; weight the bits of
    bfloat16, uint16 [vocabulary, width]. A logit of 25 is rounded to eighths, so that the most probable
    tokens are often equal.
    """
    rows, vocabulary = logits.shape
    width = x.shape[1]
    bits = np.empty(width, np.uint32)
    numbers = bits.view(np.float32)
    for row in range(rows):
        own = logits[row]
        best = largest_of(own, vocabulary)
        # two numbers that each are rounded by at most half of the last of 8 bits
        least = best - abs(best) * np.float32(2**-7)
        for start in range(0, vocabulary, BLOCK):
            count = min(BLOCK, vocabulary - start)
            if not largest_of(own[start:], count) >= least:
                continue
            for token in range(start, start + count):
                if own[token] >= least:
                    total = np.float32(0)
                    for at in range(width):
                        bits[at] = np.uint32(weight[token, at]) << np.uint32(16)
                    for at in range(width):
                        total += x[row, at] * numbers[at]
                    own[token] = total


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
