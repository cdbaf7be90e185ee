"""Gluon, which is Triton with a kernel's own choice of who holds what; in the interpreter, without threads, Triton.

A kernel of this language calls the functions of ``triton.language`` that keep a layout, and these for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from quarot_fx.lowering.triton.language import INTERPRETED

jit = triton.jit if INTERPRETED else gluon.jit


@jit
def arange(size: tl.constexpr, layout: tl.constexpr):
    """Return 0 .. size - 1."""
    return tl.arange(0, size) if INTERPRETED else gl.arange(0, size, layout)


@jit
def full(shape: tl.constexpr, value: tl.constexpr, dtype: tl.constexpr, layout: tl.constexpr):
    """Return a tensor of one value."""
    return tl.full(shape, value, dtype) if INTERPRETED else gl.full(shape, value, dtype, layout)


@jit
def held_as(x, layout: tl.constexpr):
    """Return x in another layout."""
    return x if INTERPRETED else gl.convert_layout(x, layout)


@jit
def relabelled(x, layout: tl.constexpr):
    """Return x in a layout that gives every thread what it holds already, maybe in other registers."""
    return x if INTERPRETED else gl.convert_layout(x, layout, assert_trivial=True)


@jit
def multiply_add(a, b, accumulator, layout: tl.constexpr):
    """Return accumulator + a b of float32, by ``mma``; the layout is the accumulator's, and those of a and b fit it."""
    if INTERPRETED:  # it holds bfloat16 as integers, and multiplies these
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        a = relabelled(a, gl.DotOperandLayout(0, layout, 2))
        b = relabelled(b, gl.DotOperandLayout(1, layout, 2))
        result = mma_v2(a, b, accumulator)
    return result


@jit
def result_as_right_operand(x):
    """Return 16-bit x [A, B, C] in the layout of an accumulator as the right operand of a product wants it.

    ``movmatrix`` transposes matrices of 8 x 8: a thread that held two numbers of a row has two of a column.
    """
    if not INTERPRETED:
        A: tl.constexpr = x.shape[0]
        B: tl.constexpr = x.shape[1]
        C: tl.constexpr = x.shape[2]
        x = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2
        )
        x = tl.permute(tl.reshape(x, (A, B // 8, 8, C // 8, 8)), (0, 1, 4, 3, 2))
        x = tl.reshape(x, (A, B, C))
    return x


@jit
def exp2(x):
    """Return 2^x by one instruction, 0 where that is no normal number."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y
