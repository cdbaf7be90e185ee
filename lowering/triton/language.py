"""Device functions that every kernel needs, and that are not the same on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


# -- rounding --------------------------------------------------------------------------------------


@triton.jit
def divide_scalars(x, y):
    """Return x / y for float32, correctly rounded, unlike ``/``."""
    return x / y if INTERPRETED else tl.math.div_rn(x, y)


@triton.jit
def negative(x):
    """Return -x for float32, at no cost where it is an operand; the compiler would subtract it from 0."""
    if INTERPRETED:
        y = -x
    else:
        y = tl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to a floating-point type, half to even; the interpreter's own cast to bfloat16 cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def as_float32(x):
    """Return numbers as float32; two of bfloat16 in a register by two instructions, where the compiler takes three."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        wide = x.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return wide


@triton.jit
def round_pairs_to(x, dtype: tl.constexpr):
    """Round float32 to a type of 16 bits, half to even, two neighbours of a thread by one instruction."""
    if INTERPRETED:
        y = round_to(x, dtype)
    elif dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    return y


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return the float32 product of two matrices of one floating-point type."""
    if INTERPRETED:  # it holds bfloat16 as integers, and multiplies these
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def between_products(values, dtype: tl.constexpr):
    """Return what one product gave in the type that the next one takes, for activations of this dtype."""
    values = values.to(tl.float32)
    return round_to(values, tl.bfloat16) if dtype == tl.bfloat16 else values


@triton.jit
def keep(x):
    """Return x, 16 bits an element; the compiler will not compute it again in another layout."""
    if INTERPRETED:
        result = x
    else:
        result = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return result


# -- loops -----------------------------------------------------------------------------------------


@triton.jit
def rounds(count):
    """Return a number that is not known before a kernel runs as ``range`` takes it; the interpreter's is an array."""
    return count.handle.data.item() if INTERPRETED else count


# -- a kernel's place in a stream ------------------------------------------------------------------


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait, in a kernel that was started early, for the results of the kernels before it."""
    if EARLY and not INTERPRETED:
        gdc_wait()


@triton.jit
def let_dependents_start(EARLY: tl.constexpr):
    """Allow the next kernel to be started early; what it reads of this one, it waits for."""
    if EARLY and not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers, EARLY: tl.constexpr):
    """Start to move the lines of 128 bytes at these pointers to the L2 cache, before the wait for inputs.

    Caches of level 2 are coherent, so that this is safe also where the kernel ahead still writes these lines.
    """
    if EARLY and not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
