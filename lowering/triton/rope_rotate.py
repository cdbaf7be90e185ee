"""Rotary embedding and a Hadamard transform of each head: a product with one small matrix on tensor cores."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotate_quantize import PRECISIONS
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from
from quarot_fx.rotation import Rotation

MOST_TOKENS = 128  # of a program's tile


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
    mask = (token < tokens)[:, None] & (column < SIZE)[None, :]
    HALF: tl.constexpr = SIZE // 2
    is_first = column < HALF
    other = tl.where(is_first, column + HALF, column - HALF)
    rotation = tl.load(matrix + column[:, None] * BLOCK + column[None, :])
    head_at = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    token_at = head_at + token[:, None] * stride_token
    angle_at = batch.to(tl.int64) * stride_angles + token[:, None] * SIZE + column[None, :]
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    values = tl.load(token_at + column[None, :], mask=mask, other=0).to(tl.float32)
    turned = tl.load(token_at + other[None, :], mask=mask, other=0).to(tl.float32)
    turned = tl.where(is_first[None, :], -turned, turned)
    embedded = values * tl.load(cos + angle_at, mask=mask, other=0).to(tl.float32)
    embedded += turned * tl.load(sin + angle_at, mask=mask, other=0).to(tl.float32)
    rotated = dot(round_to(embedded, rotation.dtype), rotation, PRECISION) * norm
    at = (tl.program_id(1).to(tl.int64) * tokens + token[:, None]) * SIZE + column[None, :]
    tl.store(y + at, round_to(rotated, y.dtype.element_ty), mask=mask)


@lru_cache(maxsize=64)
def _matrix(rotation: str, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the rotation of one head, filled up with zeros, and what it was divided by so that entries are +-1."""
    q = Rotation.parse(rotation).matrix()
    dense = torch.kron(torch.eye(size // len(q), dtype=q.dtype), q)
    block, norm = power_of_two_from(size), dense.abs().max().item()
    filled = torch.zeros(block, block)
    filled[:size, :size] = dense / norm
    return filled.to(dtype).to(device), norm  # cast first: a kernel may read it before it waits for kernels


def rope_rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: str) -> Tensor:
    """Return what the op declares."""
    y = x.new_empty(x.shape)
    if x.numel():
        batch, heads, tokens, size = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        matrix, norm = _matrix(rotation, size, x.device, x.dtype)
        early, block = describe(x.device).starts_early, min(power_of_two_from(tokens), MOST_TOKENS)
        stride_angles = 0 if cos.shape[0] == 1 else tokens * size
        _rope_rotate[(triton.cdiv(tokens, block), batch * heads)](
            x, cos.contiguous(), sin.contiguous(), matrix, y, heads, tokens, norm, *x.stride()[:3], stride_angles,
            SIZE=size, BLOCK=len(matrix), TOKENS=block, PRECISION=PRECISIONS[x.dtype], EARLY=early, launch_pdl=early,
            num_warps=8 if block == MOST_TOKENS else 4,
        )  # fmt: skip
    return y
