"""Rotary embedding and a Hadamard transform of each head: a product with one small matrix on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotate import PRECISIONS, load_matrix
from quarot_fx.lowering.triton.rotation_matrices import head_matrix, power_of_two_from

MOST_TOKENS = 128  # of a program's tile


@triton.jit
def load_tokens(head_at, token, tokens, stride_token, cos, sin, angles, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load tokens of one head [tokens, BLOCK], with cos and sin embedded; beyond ``tokens`` and SIZE there are zeros.

    ``angles`` is where those of the sequence begin. What is embedded is rounded to the type of the rest.
    """
    column = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (column < SIZE)[None, :]
    token_at = head_at + token[:, None] * stride_token
    values = tl.load(token_at + column[None, :], mask=mask, other=0)
    if cos is not None:
        HALF: tl.constexpr = SIZE // 2
        is_first = column < HALF
        other = tl.where(is_first, column + HALF, column - HALF)
        angle_at = angles + token[:, None] * SIZE + column[None, :]
        turned = tl.load(token_at + other[None, :], mask=mask, other=0).to(tl.float32)
        turned = tl.where(is_first[None, :], -turned, turned)
        embedded = values.to(tl.float32) * tl.load(cos + angle_at, mask=mask, other=0).to(tl.float32)
        embedded += turned * tl.load(sin + angle_at, mask=mask, other=0).to(tl.float32)
        values = round_to(embedded, values.dtype)
    return values, mask


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
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    token, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    rotation = load_matrix(matrix, BLOCK)
    head_at = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    angles = batch.to(tl.int64) * stride_angles
    embedded, mask = load_tokens(head_at, token, tokens, stride_token, cos, sin, angles, SIZE, BLOCK)
    rotated = dot(embedded, rotation, PRECISION) * norm
    at = (tl.program_id(1).to(tl.int64) * tokens + token[:, None]) * SIZE + column[None, :]
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
            SIZE=size, BLOCK=len(matrix), TOKENS=block, PRECISION=PRECISIONS[x.dtype], EARLY=early, launch_pdl=early,
            num_warps=8 if block == MOST_TOKENS else 4,
        )  # fmt: skip
    return y
