"""Loops between the matrix products of a layer on a CPU, compiled by numba.

They compute in float32. What products return and take is float32, or with weights in bfloat16 its bits,
uint16: without these loops torch would convert it in a pass of its own before and after each product. numba
doesn't see a change of what is imported from other files here: such a change must touch this file, too.
"""

import math
from typing import Any

import numba
import numpy as np

from workers.engines.chat.kernels.cpu import compiled, exp_below
from workers.engines.chat.kernels.instructions import REORDERED


@compiled
def add_and_normalize(x: Any, added: Any, weight: Any, eps: float, total: Any, out: Any) -> None:
    """Write total, x + added, and out, its root mean square norm (Zhang and Sennrich 2019).

    x, total float32 [rows, width]; added, out [rows, width], float32 or the bits of bfloat16; weight float32
    [width].
    """
    rows, width = x.shape
    bits = np.empty(width, np.uint32)
    numbers = bits.view(np.float32)
    for row in range(rows):
        _read(added[row], bits, numbers)
        squares = np.float32(0)
        for at in range(width):
            numbers[at] += x[row, at]
            squares += numbers[at] * numbers[at]
        total[row] = numbers
        scale = np.float32(1 / math.sqrt(squares / width + eps))
        for at in range(width):
            numbers[at] *= scale * weight[at]
        _write(bits, numbers, out[row])


@compiled
def gate(joined: Any, out: Any) -> None:
    """Write out = silu(gate) * up, the bits of bfloat16, uint16 [rows, width].

    joined: gate and up side by side, the bits of bfloat16, uint16 [rows, 2 * width].
    """
    rows, width = out.shape
    bits, other_bits = np.empty(width, np.uint32), np.empty(width, np.uint32)
    numbers, ups = bits.view(np.float32), other_bits.view(np.float32)
    power = np.empty(width, np.float32)
    for row in range(rows):
        _read(joined[row, :width], bits, numbers)
        _read(joined[row, width:], other_bits, ups)
        for at in range(width):
            power[at] = -abs(numbers[at])
        exp_below(power, width, np.float32(0), np.float32(1))
        _multiply_gate(numbers, power, ups)
        _write(bits, numbers, out[row])


# a check for division by zero would rule out vector instructions
@numba.njit(nogil=True, fastmath=REORDERED, error_model="numpy")
def _multiply_gate(numbers: Any, power: Any, ups: Any) -> None:
    """Replace numbers by silu(numbers) * ups, all float32 [width]. power: exp(-|numbers|), at most 1."""
    for at in range(len(numbers)):
        above = np.float32(1) if numbers[at] >= np.float32(0) else power[at]
        numbers[at] *= above / (np.float32(1) + power[at]) * ups[at]


@numba.njit(nogil=True, fastmath=REORDERED, inline="always")
def _read(row: Any, bits: Any, numbers: Any) -> None:
    """Write the numbers of a row, float32 or bits of bfloat16, to `numbers`, whose memory `bits` is."""
    if row.itemsize == 2:
        for at in range(len(row)):
            bits[at] = np.uint32(row[at]) << np.uint32(16)
    else:
        for at in range(len(row)):
            numbers[at] = row[at]


@numba.njit(nogil=True, fastmath=REORDERED, inline="always")
def _write(bits: Any, numbers: Any, row: Any) -> None:
    """Write `numbers`, whose memory `bits` is, to a row of float32, or rounded half to even to bfloat16."""
    if row.itemsize == 2:
        for at in range(len(row)):
            even = (bits[at] >> np.uint32(16)) & np.uint32(1)
            rounded = (bits[at] + np.uint32(0x7FFF) + even) >> np.uint32(16)
            is_nan = (bits[at] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            row[at] = np.uint32(0x7FC0) if is_nan else rounded
    else:
        for at in range(len(row)):
            row[at] = numbers[at]
