"""Instructions for numba's loops that its compiler doesn't make by itself, as LLVM's code."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""LLVM's fast-math flags: sums may be reordered, as vector instructions require.

Infinities keep their meaning.
"""

_READ, _INTO_L1, _DATA = 0, 3, 1
"""Arguments of llvm.prefetch."""


def _prefetch(_: Any, array: Any, first: Any, second: Any, offset: Any) -> Any:
    """Begin to load the cache line that is `offset` bytes after array[first, second]; no address is wrong."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        strides = context.make_array(array)(context, builder, arguments[0]).strides
        data = context.make_array(array)(context, builder, arguments[0]).data
        offsets = [builder.mul(at, builder.extract_value(strides, n)) for n, at in enumerate(arguments[1:3])]
        place = builder.add(builder.add(*offsets), arguments[3])
        address = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [place])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        call = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), kind)
        builder.call(call, [address, number(_READ), number(_INTO_L1), number(_DATA)])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp), generate


def _count_ones(_: Any, word: Any) -> Any:
    """Return how many bits of a word are 1."""
    return word(word), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


prefetch: Any = intrinsic(_prefetch)
count_ones: Any = intrinsic(_count_ones)


def _tile(rows: int, width: int) -> Any:
    """Make the inner loop of `add_product` for `rows` rows and `width` columns, whose sums stay in registers.

    In LLVM's instructions, because its vectorizer takes twice the time: it tests in each of these short loops
    whether the arrays overlap.
    """
    vector, words = ir.VectorType(ir.FloatType(), width), ir.VectorType(ir.IntType(32), width)

    def row_of(builder: Any, array: Any, row: Any, kind: Any) -> Any:
        """The address of a row's first item, as one of `kind`."""
        start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        offset = builder.mul(row, builder.extract_value(array.strides, 0))
        return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

    def load_vector(builder: Any, array: Any, row: Any, half: bool) -> Any:
        if not half:
            return builder.load(row_of(builder, array, row, vector), align=4)
        bits = builder.load(row_of(builder, array, row, ir.VectorType(ir.IntType(16), width)), align=2)
        return builder.bitcast(builder.shl(builder.zext(bits, words), words([16] * width)), vector)

    def repeat(builder: Any, number: Any) -> Any:
        empty = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(empty, number, ir.IntType(32)(0))
        return builder.shuffle_vector(first, empty, words([0] * width))

    @intrinsic
    def tile(_: Any, weights: Any, vectors: Any, out: Any) -> Any:
        kinds = weights, vectors, out

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            weight_rows, vector_rows, out_rows = (
                context.make_array(kind)(context, builder, array)
                for kind, array in zip(kinds, arguments, strict=True)
            )
            size, flags = context.get_value_type(types.intp), tuple(REORDERED)
            places = [row_of(builder, out_rows, size(row), vector) for row in range(rows)]
            weights_of = [row_of(builder, weight_rows, size(row), ir.FloatType()) for row in range(rows)]
            before, loop, after = builder.block, *(builder.append_basic_block() for _ in range(2))
            sums = [builder.load(place, align=4) for place in places]
            builder.branch(loop)
            builder.position_at_end(loop)
            at, *totals = (builder.phi(kind) for kind in (size, *(vector for _ in range(rows))))
            loaded = load_vector(builder, vector_rows, at, vectors.dtype == types.uint16)
            following = builder.add(at, size(1))
            at.add_incoming(size(0), before)
            at.add_incoming(following, loop)
            for row, total in enumerate(totals):
                weight = repeat(builder, builder.load(builder.gep(weights_of[row], [at])))
                total.add_incoming(sums[row], before)
                sums[row] = builder.fadd(total, builder.fmul(weight, loaded, flags), flags=flags)
                total.add_incoming(sums[row], loop)
            length = builder.extract_value(vector_rows.shape, 0)
            builder.cbranch(builder.icmp_signed("<", following, length), loop, after)
            builder.position_at_end(after)
            for total, place in zip(sums, places, strict=True):
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*kinds), generate

    return tile


tile_1x16, tile_2x16, tile_3x16, tile_4x16 = (_tile(rows, 16) for rows in (1, 2, 3, 4))
tile_1x8, tile_2x8, tile_3x8, tile_4x8 = (_tile(rows, 8) for rows in (1, 2, 3, 4))
