"""Gluon, which is Triton with a kernel's own choice of who holds what; in the interpreter, without threads, Triton.

A kernel of this language calls the functions of ``triton.language`` that keep a layout, and these for the others.
"""

from __future__ import annotations

from typing import Any

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


class _InterpretedMemory:
    """What a kernel does with Gluon's shared memory, with an array that its parts are views of."""

    def __init__(self, tensor: tl.tensor) -> None:
        self.tensor = tensor

    def slice(self, start: int, length: int, dim: int = 0) -> _InterpretedMemory:
        part = (*[slice(None)] * dim, slice(start, start + length))
        return self._with(self.tensor.handle.data[part])

    def store(self, value: tl.tensor) -> None:
        self.tensor.handle.data[:] = value.handle.data

    def load(self, layout: object) -> tl.tensor:
        return self._with(self.tensor.handle.data.copy()).tensor

    def _with(self, data: Any) -> _InterpretedMemory:
        handle = type(self.tensor.handle)(data, self.tensor.dtype)
        return _InterpretedMemory(tl.tensor(handle, tl.block_type(self.tensor.dtype, list(data.shape))))


@jit
def shared_memory(dtype: tl.constexpr, shape: tl.constexpr, layout: tl.constexpr):
    """Return shared memory, in which nothing is yet."""
    if INTERPRETED:
        memory = _InterpretedMemory(tl.full(shape, 0, dtype))
    else:
        memory = gl.allocate_shared_memory(dtype, shape, layout)
    return memory


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
