"""The operations between the matrix products of a layer on a GPU, compiled by Triton at their first call.

torch needs two to ten kernels for each of these. Between two operations numbers are rounded as transformers'
modules round them: a product of two numbers of the model's dtype is rounded before the next operation. Not
run on a GPU in this repository's tests: Triton's interpreter runs them there, and its compiler translates
them for each kind of GPU.
"""

import torch
import triton
import triton.language as tl

GATE_BLOCK = 1024
"""Numbers that a program of the gate computes: a row is divided among several multiprocessors."""


def add_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and norm the sum by its root mean square. Returns both, like x [rows, width], contiguous."""
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 256))
    add_norm_kernel[(rows,)](x, added, weight, total, normed, eps, width, block, num_warps=warps)
    return total, normed


def rotate_and_store(
    joined: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    destination: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    norms: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]] | None,
) -> torch.Tensor:
    """Embed positions in query and key, and write key and value to their pages.

    joined [tokens, heads + 2 * kv_heads, head_dim], contiguous, is query, key and value side by side;
    positions int64 [tokens]. tables: cos and sin [positions, head_dim / 2]; the pairs are (at, at + head_dim
    / 2), as in transformers. destination: pages of keys and of values [pages, page_size, kv_heads, head_dim],
    contiguous, page and offset of each token, int64 [tokens]. norms: weight [head_dim] and epsilon of the
    norms of query and key before the rotation. Returns the query [tokens, heads, head_dim].
    """
    tokens, all_heads, head_dim = joined.shape
    page_size, kv_heads = destination[0].shape[1:3]
    heads = all_heads - 2 * kv_heads
    query = joined.new_empty(tokens, heads, head_dim)
    query_norm, key_norm = norms or ((joined, 0.0), (joined, 0.0))
    block = triton.next_power_of_2(head_dim // 2)
    sizes = (heads, kv_heads, head_dim, page_size, block, norms is not None)
    rotate_and_store_kernel[(tokens, all_heads)](
        joined, query, *destination, positions, *tables, *query_norm, *key_norm, *sizes, num_warps=1
    )
    return query


def gate(joined: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. joined [rows, 2 * width], contiguous, is gate and up side by side -> [rows, width]."""
    rows, width = joined.shape[0], joined.shape[1] // 2
    out = joined.new_empty(rows, width)
    gate_kernel[(rows, triton.cdiv(width, GATE_BLOCK))](joined, out, width, GATE_BLOCK, num_warps=4)
    return out


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Multiply, and round to `dtype`. Returns float32."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def add_norm_kernel(
    x: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program for each row. See `add_norm`."""
    # int64: a row may begin beyond 2^31
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    dtype = x.dtype.element_ty
    summed = tl.load(x + row + at, inside, 0).to(tl.float32) + tl.load(added + row + at, inside, 0)
    summed = summed.to(dtype)
    tl.store(total + row + at, summed, inside)
    summed = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(summed * summed) / WIDTH + eps)
    unweighted = (summed * scale).to(dtype)
    tl.store(normed + row + at, _product(unweighted, tl.load(weight + at, inside, 0), dtype), inside)


# a token count that is odd shifts these arrays: without this, serving would stop to compile a second version
@triton.jit(do_not_specialize_on_alignment=["positions", "pages", "offsets"])
def rotate_and_store_kernel(
    joined: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_weight: tl.tensor,
    query_eps: tl.tensor,
    key_weight: tl.tensor,
    key_eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """One program for each token and head. See `rotate_and_store`."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    at = tl.arange(0, BLOCK)
    inside = at < half
    dtype = joined.dtype.element_ty
    source = joined + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + at
    first, second = tl.load(source, inside, 0), tl.load(source + half, inside, 0)
    if head < HEADS + KV_HEADS:
        if NORM:
            if head < HEADS:
                weight, eps = query_weight + at, query_eps
            else:
                weight, eps = key_weight + at, key_eps
            wide, wide_second = first.to(tl.float32), second.to(tl.float32)
            squares = tl.sum(wide * wide) + tl.sum(wide_second * wide_second)
            scale = tl.rsqrt(squares / HEAD_DIM + eps)
            first = _product((wide * scale).to(dtype), tl.load(weight, inside, 0), dtype).to(dtype)
            second = (wide_second * scale).to(dtype)
            second = _product(second, tl.load(weight + half, inside, 0), dtype).to(dtype)
        position = tl.load(positions + token) * half
        c, s = tl.load(cos + position + at, inside, 0), tl.load(sin + position + at, inside, 0)
        turned = _product(first, c, dtype) - _product(second, s, dtype)
        second = (_product(second, c, dtype) + _product(first, s, dtype)).to(dtype)
        first = turned.to(dtype)
    place = (tl.load(pages + token) * PAGE_SIZE + tl.load(offsets + token)) * KV_HEADS
    if head < HEADS:
        target = query + (token * HEADS + head) * HEAD_DIM
    elif head < HEADS + KV_HEADS:
        target = keys + (place + head - HEADS) * HEAD_DIM
    else:
        target = values + (place + head - HEADS - KV_HEADS) * HEAD_DIM
    tl.store(target + at, first, inside)
    tl.store(target + half + at, second, inside)


@triton.jit
def gate_kernel(joined: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One program for each row and BLOCK of its numbers. See `gate`."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    dtype = joined.dtype.element_ty
    gated = tl.load(joined + 2 * row + at, inside, 0).to(tl.float32)
    up = tl.load(joined + 2 * row + WIDTH + at, inside, 0)
    activated = (gated / (1 + tl.exp(-gated))).to(dtype)
    tl.store(out + row + at, _product(activated, up, dtype), inside)
