"""LLVM operations that numba does not offer, and the decorator that compiles the CPU kernels.

Most are scalar operations. LLVM turns them into vector instructions in a plain loop, on any processor. The file imports
``numba`` at the top, so import it only where a kernel is used.
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
"""SHA-256 of all files with compiled functions. One stamp for all, because functions are compiled into one another."""

_INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()

LANES = 8
"""Values that :func:`stream_normalised` writes; LLVM splits them where a processor's vectors are shorter."""
STREAM_ALIGNMENT = 4 * LANES
"""Alignment in bytes that :func:`stream_normalised` needs of its target."""
_FLOATS = ir.VectorType(_FLOAT, LANES)

BLEND_BITS = 6
"""Fractional bits, of a weight's 22, in the upper of :func:`blend`'s two factors."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile ``function`` with numba on first use, without the GIL, and cache it on disk where that is possible."""
    try:
        kernel = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available", so neither this folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)
    # numba checks only the kernel's own file for changes, and would keep code compiled from an old version of another
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
    """out[target + k] = normalised levels[source + k] for k in 0..7, stored past the caches. No bounds are checked.

    ``levels`` uint8, ``factors`` and ``out`` float32 are contiguous and flat. factors[j · width + column + k] are the
    mean (j = 0), and head (1) and tail (2) of 1 / std; ``by_255`` (float32, float32) is head and tail of 1 / 255. See
    :mod:`.normalise_cpu`. ``out[target]`` must be aligned to STREAM_ALIGNMENT bytes.

    An ordinary store would first fetch the memory it overwrites, and evict data that is still in use from the caches.
    The function works on vectors itself, because LLVM does not vectorise such stores.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, source, _, column, width, by_255, _, target = arguments

        def pointer(array, position, kind):  # type: ignore[no-untyped-def]
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [position]), kind.as_pointer())

        def factor(number):  # type: ignore[no-untyped-def]
            position = builder.add(column, builder.mul(width, ir.Constant(width.type, number)))
            return builder.load(pointer(2, position, _FLOATS), align=4)

        head, tail = (_in_all_lanes(builder, builder.extract_value(by_255, part)) for part in (0, 1))
        level = builder.load(pointer(0, source, ir.VectorType(_INT8, LANES)), align=1)
        level = builder.uitofp(builder.zext(level, ir.VectorType(_INT32, LANES)), _FLOATS)
        scaled = _fma(builder, "llvm.fma.v8f32", level, head, builder.fmul(level, tail))
        shifted = builder.fsub(scaled, factor(0))
        value = _fma(builder, "llvm.fma.v8f32", shifted, factor(1), builder.fmul(shifted, factor(2)))
        store = builder.store(value, pointer(6, target, _FLOATS), align=STREAM_ALIGNMENT)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    pair = types.UniTuple(types.float32, 2)
    signature = types.void(levels, types.uintp, factors, types.uintp, types.uintp, pair, out, types.uintp)
    return signature, generate


@intrinsic
def blend(typing_context, upper, lower, high, low):  # type: ignore[no-untyped-def]
    """uint8 upper + ((lower − upper) · weight + 2^21 >> 22), in 16-bit arithmetic; weight = high · 2^16 + low.

    With d = lower − upper, (d · weight + 2^21) >> 22 = (d · high + (d · low >> 16) + 32) >> 6. The equation is exact,
    because two floors in a row equal one floor of the whole. ``high`` (0..64) and ``low`` (−2^15..2^15 − 1) are int16,
    and every term fits int16. numba alone would compute in 64 bits.
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
    """uint32 of four bytes of ``array`` (contiguous uint8) from ``position`` on, little-endian.

    The position need not be aligned; bounds are not checked.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(_element_pointer(context, builder, signature, arguments, _INT32), align=1)

    return types.uint32(array, types.uintp), generate


@intrinsic
def store_eight_bytes(typing_context, array, position, value):  # type: ignore[no-untyped-def]
    """Write uint64 ``value`` to ``array`` (contiguous uint8) from ``position`` on, little-endian.

    The position need not be aligned; bounds are not checked.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.store(arguments[2], _element_pointer(context, builder, signature, arguments, _INT64), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uintp, types.uint64), generate


def _element_pointer(context, builder, signature, arguments, kind):  # type: ignore[no-untyped-def]
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
