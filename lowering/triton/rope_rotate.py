"""Rotary embedding and a Hadamard transform of each head: a product with one small matrix on tensor cores.

The halves of a head, which the embedding mixes, are loaded once, and each is multiplied with its rows of the matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, keep, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotate import PRECISIONS
from quarot_fx.lowering.triton.rotation_matrices import head_matrix, power_of_two_from

MOST_TOKENS = 128  # of a program's tile


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
    upper, lower = load_halves(matrix, SIZE, BLOCK, HALF_BLOCK)
    head_at = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    angles = batch.to(tl.int64) * stride_angles
    first, second = embedded_halves(head_at, token, tokens, stride_token, cos, sin, angles, SIZE, HALF_BLOCK)
    rotated = (dot(first, upper, PRECISION) + dot(second, lower, PRECISION)) * norm
    at = (tl.program_id(1).to(tl.int64) * tokens + token[:, None]) * SIZE + column[None, :]
    mask = (token < tokens)[:, None] & (column < SIZE)[None, :]
    tl.store(y + at, round_to(rotated, y.dtype.element_ty), mask=mask)


def rope_rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: str) -> Tensor:
    """Return what the op declares."""
    y = x.new_empty(x.shape)
    if x.numel():
        batch, heads, tokens, size = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        matrix, norm = head_matrix(rotation, size, x.device, x.dtype)
        early, block = describe(x.device).starts_early, min(power_of_two_from(tokens), MOST_TOKENS)
        stride_angles = 0 if cos.shape[0] == 1 else tokens * size
        _rope_rotate[(triton.cdiv(tokens, block), batch * heads)](
            x, cos.contiguous(), sin.contiguous(), matrix, y, heads, tokens, norm, *x.stride()[:3], stride_angles,
            SIZE=size, BLOCK=len(matrix), HALF_BLOCK=power_of_two_from(size // 2), TOKENS=block,
            PRECISION=PRECISIONS[x.dtype], EARLY=early, launch_pdl=early,
            num_warps=8 if block == MOST_TOKENS else 4,
        )  # fmt: skip
    return y
