"""What numba has no word for: operations of LLVM that the CPU kernels stand on, and the way they are compiled.

Most are scalar operations, of which LLVM makes vector instructions in a plain loop, on any processor. numba is imported
at the top; import this module only where it is wanted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_SOURCES = ("intrinsics.py", "normalise_cpu.py", "render_cpu.py")
SOURCES_STAMP = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)).hexdigest()
"""Of all files that kernels are compiled from, together: they are compiled into one another."""

_INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()

LANES = 8
"""Values that :func:`stream_normalised` writes; LLVM cuts them up where a processor's vectors are shorter."""
STREAM_ALIGNMENT = 4 * LANES
"""Bytes, of the place it writes to."""
_FLOATS = ir.VectorType(_FLOAT, LANES)

BLEND_BITS = 6
"""Of a weight's 22 fractional bits those in the upper of :func:`blend`'s two factors."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the GIL; keep the result on disk where a place for it can be written to."""
    try:
        kernel = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available", neither beside this file nor in the user's cache
        return numba.njit(nogil=True)(function)
    # numba would look for changes in the kernel's own file only, and go on with what it compiled from another one as it
    # was
    kernel._cache._cache_file._source_stamp = SOURCES_STAMP
    return kernel


@intrinsic
def fused_multiply_add(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """float32 a · b + c, rounded once (IEEE 754's fusedMultiplyAdd)."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _fma(builder, "llvm.fma.f32", *arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def stream_normalised(typing_context, levels, source, factors, column, width, by_255, out, target):  # type: ignore[no-untyped-def]
    """out[target + k] = normalised levels[source + k] for k in 0..7, by way of no cache. Unchecked.

    ``levels`` uint8, ``factors`` and ``out`` float32 are contiguous and flat; factors[j · width + column + k] are mean,
    head and tail of 1 / std, and ``by_255`` (float32, float32) head and tail of 1 / 255: see :mod:`.normalise_cpu`. The
    place in ``out`` lies on a boundary of STREAM_ALIGNMENT bytes. An ordinary store would first fetch the memory it is
    about to overwrite, and drive out of the caches what is still in use; LLVM makes no vectors of stores like this one
    by itself.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, source, _, column, width, by_255, _, target = arguments

        def place(array, position, kind):  # type: ignore[no-untyped-def]
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [position]), kind.as_pointer())

        def factor(number):  # type: ignore[no-untyped-def]
            position = builder.add(column, builder.mul(width, ir.Constant(width.type, number)))
            return builder.load(place(2, position, _FLOATS), align=4)

        head, tail = (_in_all_lanes(builder, builder.extract_value(by_255, part)) for part in (0, 1))
        level = builder.load(place(0, source, ir.VectorType(_INT8, LANES)), align=1)
        level = builder.uitofp(builder.zext(level, ir.VectorType(_INT32, LANES)), _FLOATS)
        scaled = _fma(builder, "llvm.fma.v8f32", level, head, builder.fmul(level, tail))
        shifted = builder.fsub(scaled, factor(0))
        value = _fma(builder, "llvm.fma.v8f32", shifted, factor(1), builder.fmul(shifted, factor(2)))
        store = builder.store(value, place(6, target, _FLOATS), align=STREAM_ALIGNMENT)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    pair = types.UniTuple(types.float32, 2)
    signature = types.void(levels, types.uintp, factors, types.uintp, types.uintp, pair, out, types.uintp)
    return signature, generate


@intrinsic
def blend(typing_context, upper, lower, high, low):  # type: ignore[no-untyped-def]
    """uint8 upper + ((lower − upper) · weight + 2^21 >> 22), where weight = high · 2^16 + low, all of it in 16 bits.

    With d = lower − upper, d · weight + 2^21 >> 22 = d · high + (d · low >> 16) + 32 >> 6, exactly: flooring twice is
    flooring once. ``high`` (0..64) and ``low`` (−2^15..2^15 − 1) are int16, and no term leaves int16. numba alone would
    compute in 64 bits.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        above, below, high, low = arguments
        above = builder.zext(above, _INT16)
        difference = builder.sub(builder.zext(below, _INT16), above)
        product = builder.mul(builder.sext(difference, _INT32), builder.sext(low, _INT32))
        upper_half = builder.trunc(builder.ashr(product, ir.Constant(_INT32, 16)), _INT16)  # one instruction: pmulhw
        total = builder.add(
            builder.add(builder.mul(difference, high), upper_half), ir.Constant(_INT16, 1 << (BLEND_BITS - 1))
        )
        return builder.trunc(builder.add(above, builder.ashr(total, ir.Constant(_INT16, BLEND_BITS))), _INT8)

    return types.uint8(types.uint8, types.uint8, types.int16, types.int16), generate


@intrinsic
def load_four_bytes(typing_context, array, position):  # type: ignore[no-untyped-def]
    """uint32 of ``array`` (contiguous uint8) from ``position`` on, aligned or not, lowest byte first. Unchecked."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(_place(context, builder, signature, arguments, _INT32), align=1)

    return types.uint32(array, types.uintp), generate


@intrinsic
def store_eight_bytes(typing_context, array, position, value):  # type: ignore[no-untyped-def]
    """Write uint64 ``value`` to ``array`` (contiguous uint8) from ``position`` on, aligned or not, lowest byte first.
    Unchecked.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.store(arguments[2], _place(context, builder, signature, arguments, _INT64), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uintp, types.uint64), generate


def _place(context, builder, signature, arguments, kind):  # type: ignore[no-untyped-def]
    """Pointer to a ``kind`` at the position arguments[1] of the array arguments[0]."""
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), kind.as_pointer())


def _fma(builder, name, a, b, c):  # type: ignore[no-untyped-def]
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _in_all_lanes(builder, value):  # type: ignore[no-untyped-def]
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))
