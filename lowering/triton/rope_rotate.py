"""Rotary embedding and a Hadamard transform of each head.

Heads of bfloat16 whose sizes are powers of two are rotated in slabs of several tokens (``rotate_slabs``): a half of one
is loaded twice, the second time from a close cache, and angles once for several heads. All others, and balanced ones,
are multiplied with one small matrix: their halves are loaded once, and each is multiplied with its rows of the matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import as_float32, dot, keep, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotate import PRECISIONS, load_matrix
from quarot_fx.lowering.triton.rotate_slabs import SIDE, slab_places, slabs_rotated
from quarot_fx.lowering.triton.rotation_matrices import (
    HEAD_SLABS,
    HeadMatrices,
    Split,
    head_matrices,
    head_slabs,
    matrices,
    power_of_two_from,
)

MOST_TOKENS = 128  # of a program's tile
MOST_HEADS = 4  # that a program takes one after the other
PROGRAMS = 4  # on a multiprocessor, before a program takes several heads


@triton.jit
def matrix_of_head(matrices, head, sharing, BLOCK: tl.constexpr):
    """Return where the matrix [BLOCK, BLOCK] of a head is, which so many share, or all; nothing of nothing."""
    if matrices is None:
        at = None
    elif sharing is None:
        at = matrices
    else:
        at = matrices + head // sharing * (BLOCK * BLOCK)
    return at


@triton.jit
def load_halves(matrix, SIZE: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Return the rows of a matrix [BLOCK, BLOCK] that each half of a head is multiplied with, [HALF_BLOCK, BLOCK]."""
    row, column = tl.arange(0, HALF_BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at, mask = matrix + row * BLOCK + column, row < SIZE // 2
    return tl.load(at, mask=mask, other=0), tl.load(at + SIZE // 2 * BLOCK, mask=mask, other=0)


@triton.jit
def embedded_halves(
    head_at, token, tokens, stride_token, cos, sin, angles, SIZE: tl.constexpr, HALF_BLOCK: tl.constexpr
):
    """Load tokens of one head and return the halves of what they are when embedded, [tokens, HALF_BLOCK], rounded.

    ``angles`` is where those of the sequence begin. Beyond ``tokens`` and half the size there are zeros.
    """
    HALF: tl.constexpr = SIZE // 2
    column = tl.arange(0, HALF_BLOCK)
    mask = (token < tokens)[:, None] & (column < HALF)[None, :]
    at, angle_at = (
        head_at + token[:, None] * stride_token + column[None, :],
        angles + token[:, None] * SIZE + column[None, :],
    )
    first, second = tl.load(at, mask=mask, other=0), tl.load(at + HALF, mask=mask, other=0)
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    embedded = first * tl.load(cos + angle_at, mask=mask, other=0).to(tl.float32)
    embedded -= second * tl.load(sin + angle_at, mask=mask, other=0).to(tl.float32)
    other = second * tl.load(cos + angle_at + HALF, mask=mask, other=0).to(tl.float32)
    other += first * tl.load(sin + angle_at + HALF, mask=mask, other=0).to(tl.float32)
    embedded, other = round_to(embedded, dtype), round_to(other, dtype)
    if dtype != tl.float32:
        embedded, other = keep(embedded), keep(other)
    return embedded, other


@triton.jit
def _rope_rotate(
    x,
    cos,
    sin,
    matrix,
    y,
    heads,
    sharing,
    tokens,
    norm,
    stride_batch,
    stride_head,
    stride_token,
    stride_angles,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    token, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    upper, lower = load_halves(matrix_of_head(matrix, head, sharing, BLOCK), SIZE, BLOCK, HALF_BLOCK)
    head_at = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    angles = batch.to(tl.int64) * stride_angles
    first, second = embedded_halves(head_at, token, tokens, stride_token, cos, sin, angles, SIZE, HALF_BLOCK)
    rotated = (dot(first, upper, PRECISION) + dot(second, lower, PRECISION)) * norm
    at = (tl.program_id(1).to(tl.int64) * tokens + token[:, None]) * SIZE + column[None, :]
    mask = (token < tokens)[:, None] & (column < SIZE)[None, :]
    tl.store(y + at, round_to(rotated, y.dtype.element_ty), mask=mask)


@triton.jit
def _rope_rotate_slabs(
    x,
    cos,
    sin,
    first,
    second,
    y,
    heads,
    tokens,
    norm,
    stride_batch,
    stride_head,
    stride_token,
    stride_angles,
    SIZE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Embed and rotate ELEMENTS of each of HEADS heads."""
    HALF: tl.constexpr = SIZE // 2
    dtype: tl.constexpr = x.dtype.element_ty
    groups = tl.cdiv(heads, HEADS)
    batch, first_head = tl.program_id(1) // groups, tl.program_id(1) % groups * HEADS
    first_matrix, second_matrix = load_matrix(first, SIDE), load_matrix(second, SIDE)
    _, place = slab_places(ELEMENTS, ELEMENTS)
    token, column = tl.program_id(0) * (ELEMENTS // SIZE) + place // SIZE, place % SIZE
    other = tl.where(column < HALF, column + HALF, column - HALF)
    is_token = token < tokens
    angle_at = batch.to(tl.int64) * stride_angles + token * SIZE + column
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    cosines = as_float32(tl.load(cos + angle_at, mask=is_token, other=0))
    sines = as_float32(tl.load(sin + angle_at, mask=is_token, other=0))
    sines = tl.where(column < HALF, -sines, sines)
    for index in tl.static_range(HEADS):
        head = first_head + index
        mask = token < tl.where(head < heads, tokens, 0)
        head_at = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
        values = tl.load(head_at + token * stride_token + column, mask=mask, other=0)
        others = tl.load(head_at + token * stride_token + other, mask=mask, other=0)
        embedded = keep(round_to(as_float32(values) * cosines + as_float32(others) * sines, dtype))
        rotated = slabs_rotated(embedded, first_matrix, second_matrix, dtype, PRECISION) * norm
        row = (batch * heads + head).to(tl.int64) * tokens
        tl.store(y + (row + token) * SIZE + column, round_to(rotated, dtype), mask=mask)


def rope_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, rotation: str, balance: str | None = None, inverse: bool = False
) -> Tensor:
    """Return what the op declares."""
    y = x.new_empty(x.shape)
    if x.numel():
        tokens, size = x.shape[2:]
        x = x if x.stride(-1) == 1 else x.contiguous()
        stride_angles = 0 if cos.shape[0] == 1 else tokens * size
        strides = (*x.stride()[:3], stride_angles)
        operands = x, cos.contiguous(), sin.contiguous()
        if balance is None and (cut := head_slabs(rotation, size, x.dtype)):
            _launch_slabs(*operands, y, cut, strides)
        else:
            of_heads = head_matrices(size, x.device, x.dtype, rotation, balance, inverse)
            _launch_matrices(*operands, y, of_heads, strides)
    return y


def _launch_slabs(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, cut: Split, strides: tuple[int, ...]) -> None:
    (batch, heads, tokens, size), device = x.shape, describe(x.device)
    _, second, first = matrices(cut, x.device, x.dtype)
    tiles = triton.cdiv(tokens, HEAD_SLABS // size)
    each = MOST_HEADS if tiles * batch * heads >= MOST_HEADS * PROGRAMS * device.multiprocessors else 1
    _rope_rotate_slabs[(tiles, batch * triton.cdiv(heads, each))](
        x, cos, sin, first, second, y, heads, tokens, cut.norm, *strides,
        SIZE=size, ELEMENTS=HEAD_SLABS, HEADS=each, PRECISION=PRECISIONS[x.dtype],
        EARLY=device.starts_early, launch_pdl=device.starts_early, num_warps=4,
    )  # fmt: skip


def _launch_matrices(
    x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, of_heads: HeadMatrices, strides: tuple[int, ...]
) -> None:
    batch, heads, tokens, size = x.shape
    early, block = describe(x.device).starts_early, min(power_of_two_from(tokens), MOST_TOKENS)
    _rope_rotate[(triton.cdiv(tokens, block), batch * heads)](
        x, cos, sin, of_heads.values, y, heads, of_heads.sharing(heads), tokens, of_heads.norm, *strides,
        SIZE=size, BLOCK=of_heads.block, HALF_BLOCK=power_of_two_from(size // 2), TOKENS=block,
        PRECISION=PRECISIONS[x.dtype], EARLY=early, launch_pdl=early,
        num_warps=8 if block == MOST_TOKENS else 4,
    )  # fmt: skip
