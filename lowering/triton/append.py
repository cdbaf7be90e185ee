"""New keys or values are embedded, rotated, quantised, packed and stored by one kernel, which reads them once.

A program takes many tokens of one head: a Hadamard transform is a product with one small matrix on tensor cores, as in
``rope_rotate``, and a token's codes stay in registers until their bytes are put together. Of one token it takes nothing
but this row: as few instructions as possible, which are fetched for the first time in every decoding step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, keep, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.quantization import encode_asymmetric, low_byte
from quarot_fx.lowering.triton.rope_rotate import embedded_halves, load_halves
from quarot_fx.lowering.triton.rotate import PRECISIONS, load_matrix
from quarot_fx.lowering.triton.rotation_matrices import head_matrix, power_of_two_from

MOST_TOKENS = 64  # of a program's tile
ONE_WARP = 256  # elements that one warp takes, without a barrier


@triton.jit
def _append(
    x,
    cos,
    sin,
    matrix,
    position,
    codes,
    scale,
    zero,
    y,
    heads,
    tokens,
    capacity,
    norm,
    clip,
    stride_batch,
    stride_head,
    stride_token,
    stride_angles,
    stride_codes_batch,
    stride_codes_head,
    stride_codes,
    stride_scale_batch,
    stride_scale_head,
    stride_scale,
    stride_zero_batch,
    stride_zero_head,
    stride_zero,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take TOKENS of one head; a row of BLOCK elements has GROUP_BLOCKS groups, of which GROUPS hold the head."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    token, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    if cos is not None:
        upper, lower = load_halves(matrix, SIZE, BLOCK, HALF_BLOCK)
    else:
        rotation = load_matrix(matrix, BLOCK)
    head_at = x + batch * stride_batch + head * stride_head
    mask = (token < tokens)[:, None] & (column < SIZE)[None, :]
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    place = tl.load(position + token, mask=token < tokens, other=-1)
    if cos is not None:
        angles = batch * stride_angles
        first, second = embedded_halves(head_at, token, tokens, stride_token, cos, sin, angles, SIZE, HALF_BLOCK)
        values = dot(first, upper, PRECISION) + dot(second, lower, PRECISION)
    else:
        values = tl.load(head_at + token[:, None] * stride_token + column[None, :], mask=mask, other=0)
        if matrix is not None:
            values = dot(values, rotation, PRECISION)
    is_stored = (place >= 0) & (place < capacity)
    if matrix is not None:
        values = round_to(values * norm, x.dtype.element_ty)
        if values.dtype != tl.float32:
            values = keep(values)
    rows = tl.reshape(values.to(tl.float32), (TOKENS * GROUP_BLOCKS, BLOCK // GROUP_BLOCKS))
    row_codes, step, zeros = encode_asymmetric(rows, clip, BITS)
    if y is not None:
        numbers = tl.reshape((row_codes - zeros[:, None]) * step[:, None], (TOKENS, BLOCK))
        at = (tl.program_id(1).to(tl.int64) * tokens + token[:, None]) * SIZE + column[None, :]
        tl.store(y + at, round_to(numbers, y.dtype.element_ty), mask=mask)
    CODES: tl.constexpr = 8 // BITS  # of a byte
    BYTES: tl.constexpr = (SIZE * BITS + 7) // 8
    token_codes = tl.reshape(row_codes, (TOKENS, BLOCK))
    if SIZE % CODES:
        token_codes = tl.where((column < SIZE)[None, :], token_codes, 0.0)  # the last byte is filled up with zeros
    if CODES > 1:
        factors = (1 << (tl.arange(0, CODES) * BITS)).to(tl.float32)  # that put codes side by side, exactly
        token_codes = tl.sum(tl.reshape(token_codes, (TOKENS, BLOCK // CODES, CODES)) * factors[None, None, :], axis=2)
    byte, group = tl.arange(0, BLOCK // CODES), tl.arange(0, GROUP_BLOCKS)
    at = codes + batch * stride_codes_batch + head * stride_codes_head + place[:, None] * stride_codes + byte[None, :]
    tl.store(at, low_byte(token_codes), mask=is_stored[:, None] & (byte < BYTES)[None, :])
    mask = is_stored[:, None] & (group < GROUPS)[None, :]
    at = batch * stride_scale_batch + head * stride_scale_head + place[:, None] * stride_scale + group[None, :]
    tl.store(scale + at, tl.reshape(step, (TOKENS, GROUP_BLOCKS)), mask=mask)
    at = batch * stride_zero_batch + head * stride_zero_head + place[:, None] * stride_zero + group[None, :]
    tl.store(zero + at, low_byte(tl.reshape(zeros, (TOKENS, GROUP_BLOCKS))), mask=mask)


def append(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    x: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: str | None,
    bits: int,
    group: int | None,
    clip: float,
) -> None:
    """Do what the op declares."""
    append_rows(codes, scale, zero, x, position, cos, sin, rotation, bits, group, clip, None)


def append_rows(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    x: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: str | None,
    bits: int,
    group: int | None,
    clip: float,
    y: Tensor | None,
) -> None:
    """Append x to a cache, and store the numbers that its codes stand for in y, if that is there."""
    if not x.numel():
        return
    batch, heads, tokens, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    matrix, norm = (None, 1.0) if rotation is None else head_matrix(rotation, size, x.device, x.dtype)
    stride_angles = 0
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
        stride_angles = 0 if len(cos) == 1 else tokens * size
    row, tile = power_of_two_from(size), min(power_of_two_from(tokens, smallest=1), MOST_TOKENS)
    early = describe(x.device).starts_early
    _append[(triton.cdiv(tokens, tile), batch * heads)](
        x, cos, sin, matrix, position, codes, scale, zero, y, heads, tokens, codes.shape[2], norm, clip,
        *x.stride()[:3], stride_angles, *codes.stride()[:3], *scale.stride()[:3], *zero.stride()[:3],
        SIZE=size, BLOCK=row, HALF_BLOCK=power_of_two_from(size // 2),
        GROUPS=scale.shape[-1], GROUP_BLOCKS=1 if scale.shape[-1] == 1 else row // group,
        BITS=bits, TOKENS=tile, PRECISION=PRECISIONS[x.dtype], EARLY=early, launch_pdl=early,
        num_warps=1 if rotation is None and tile * row <= ONE_WARP else 4,
        enable_fp_fusion=False,  # a product is rounded before it is added to another, as in the reference
    )  # fmt: skip
