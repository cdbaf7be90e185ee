"""New keys or values are embedded, balanced, rotated, quantised, packed and stored by one kernel that reads them once.

A program takes many tokens of one head: a Hadamard transform is a product with one small matrix on tensor cores, as in
``rope_rotate``, and a token's codes stay in registers until their bytes are put together. Of one token it takes nothing
but this row: as few instructions as possible, which are fetched for the first time in every decoding step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from quarot_fx.lowering.triton import append_prompt
from quarot_fx.lowering.triton.appended import Appended
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, keep, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.quantization import (
    ROUND_TO_INTEGER,
    ROUND_TO_INTEGER_BITS,
    encode_asymmetric,
    low_byte,
)
from quarot_fx.lowering.triton.rope_rotate import embedded_halves, load_halves, matrix_of_head
from quarot_fx.lowering.triton.rotate import PRECISIONS, load_matrix
from quarot_fx.lowering.triton.rotation_matrices import head_matrices, power_of_two_from

MOST_TOKENS = 64  # of a program's tile
ONE_WARP = 256  # elements that one warp takes, without a barrier


@triton.jit
def _append(
    keys, values, key_heads, KEYS: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr
):
    """Append keys or values, of ``key_heads`` heads in all sequences together, and others, if there are any."""
    head = tl.program_id(1)
    if VALUES is None or head < key_heads:
        _append_tile(*keys, head, KEYS, TOKENS, EARLY)
    else:
        _append_tile(*values, head - key_heads, VALUES, TOKENS, EARLY)


@triton.jit
def _append_tile(
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
    sharing,
    tokens,
    skipped,
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
    head_of_all,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take TOKENS of one head; a row of BLOCK elements has GROUP_BLOCKS groups, of which GROUPS hold the head.

    The first ``skipped`` tokens are not stored.
    """
    SIZE: tl.constexpr = SCHEME[0]
    BLOCK: tl.constexpr = SCHEME[1]
    HALF_BLOCK: tl.constexpr = SCHEME[2]
    GROUPS: tl.constexpr = SCHEME[3]
    GROUP_BLOCKS: tl.constexpr = SCHEME[4]
    BITS: tl.constexpr = SCHEME[5]
    PRECISION: tl.constexpr = SCHEME[6]
    batch, head = (head_of_all // heads).to(tl.int64), (head_of_all % heads).to(tl.int64)
    token, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    at = matrix_of_head(matrix, head, sharing, BLOCK)
    if cos is not None:
        upper, lower = load_halves(at, SIZE, BLOCK, HALF_BLOCK)
    else:
        of_head = load_matrix(at, BLOCK)
    head_at = x + batch * stride_batch + head * stride_head
    mask = (token < tokens)[:, None] & (column < SIZE)[None, :]
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    place = tl.load(position + token - skipped, mask=(token >= skipped) & (token < tokens), other=-1)
    if cos is not None:
        angles = batch * stride_angles
        first, second = embedded_halves(head_at, token, tokens, stride_token, cos, sin, angles, SIZE, HALF_BLOCK)
        values = dot(first, upper, PRECISION) + dot(second, lower, PRECISION)
    else:
        values = tl.load(head_at + token[:, None] * stride_token + column[None, :], mask=mask, other=0)
        if matrix is not None:
            values = dot(values, of_head, PRECISION)
    is_stored = (place >= 0) & (place < capacity)
    if matrix is not None:
        values = round_to(values * norm, x.dtype.element_ty)
        if values.dtype != tl.float32:
            values = keep(values)
    rows = tl.reshape(values.to(tl.float32), (TOKENS * GROUP_BLOCKS, BLOCK // GROUP_BLOCKS))
    row_codes, step, zeros = encode_asymmetric(rows, clip, BITS)
    if y is not None:
        numbers = tl.reshape((row_codes - ROUND_TO_INTEGER) * step[:, None], (TOKENS, BLOCK))
        at = (head_of_all.to(tl.int64) * tokens + token[:, None]) * SIZE + column[None, :]
        tl.store(y + at, round_to(numbers, y.dtype.element_ty), mask=mask)
    WORD: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth
    CODES: tl.constexpr = WORD // BITS  # of a word
    WORDS: tl.constexpr = (SIZE * BITS + WORD - 1) // WORD
    integers = row_codes.to(tl.int32, bitcast=True) - ROUND_TO_INTEGER_BITS
    # Zero points are added to words where that is one for each, which takes fewer additions.
    IS_OF_WORDS: tl.constexpr = SIZE % CODES == 0 and BLOCK // GROUP_BLOCKS >= CODES
    if not IS_OF_WORDS:
        integers += zeros.to(tl.int32)[:, None]
    token_codes = tl.reshape(integers, (TOKENS, BLOCK))
    if SIZE % CODES:
        token_codes = tl.where((column < SIZE)[None, :], token_codes, 0)  # the last word is filled up with zeros
    word, group = tl.arange(0, BLOCK // CODES), tl.arange(0, GROUP_BLOCKS)
    places = tl.arange(0, CODES) * BITS
    words = tl.sum(tl.reshape(token_codes, (TOKENS, BLOCK // CODES, CODES)) << places[None, None, :], axis=2)
    if IS_OF_WORDS:
        ONES: tl.constexpr = (2**WORD - 1) // (2**BITS - 1)  # a one in the place of each code
        in_groups = tl.reshape(words, (TOKENS * GROUP_BLOCKS, BLOCK // CODES // GROUP_BLOCKS))
        words = tl.reshape(in_groups + (zeros.to(tl.int32) * ONES)[:, None], (TOKENS, BLOCK // CODES))
    at = codes + batch * stride_codes_batch + head * stride_codes_head + place[:, None] * stride_codes + word[None, :]
    tl.store(at, words.to(codes.dtype.element_ty), mask=is_stored[:, None] & (word < WORDS)[None, :])
    mask = is_stored[:, None] & (group < GROUPS)[None, :]
    at = batch * stride_scale_batch + head * stride_scale_head + place[:, None] * stride_scale + group[None, :]
    tl.store(scale + at, tl.reshape(step, (TOKENS, GROUP_BLOCKS)), mask=mask)
    at = batch * stride_zero_batch + head * stride_zero_head + place[:, None] * stride_zero + group[None, :]
    tl.store(zero + at, low_byte(tl.reshape(zeros, (TOKENS, GROUP_BLOCKS))), mask=mask)


def append(*new: Any) -> None:
    """Do what the op declares."""
    launch_appends(Appended(*new))


def launch_appends(keys: Appended, values: Appended | None = None) -> None:
    """Append to one cache, or to two at the same positions."""
    parts = [keys] if values is None else [keys, values]
    if not any(part.x.numel() for part in parts):
        return
    if all(append_prompt.takes(part) for part in parts):
        append_prompt.launch(parts)
    else:
        _launch_tiles(parts)


def _launch_tiles(parts: Sequence[Appended]) -> None:
    """Take many tokens of a head at a time."""
    tokens = parts[0].x.shape[2]
    tile = min(power_of_two_from(tokens, smallest=1), MOST_TOKENS)
    heads = [part.x.shape[0] * part.x.shape[1] for part in parts]
    arguments, schemes = [part.arguments(head_matrices) for part in parts], [_scheme(part) for part in parts]
    is_small = not any(part.is_multiplied or tile * _block(part) > ONE_WARP for part in parts)
    early = describe(parts[0].x.device).starts_early
    _append[(triton.cdiv(tokens, tile), sum(heads))](
        arguments[0], arguments[1] if len(parts) > 1 else None, heads[0],
        KEYS=schemes[0], VALUES=schemes[1] if len(parts) > 1 else None, TOKENS=tile,
        EARLY=early, launch_pdl=early, num_warps=1 if is_small else 4,
        enable_fp_fusion=False,  # a product is rounded before it is added to another, as in the reference
    )  # fmt: skip


def _scheme(new: Appended) -> tuple[Any, ...]:
    """Return what a program is compiled for."""
    size, groups, block = new.x.shape[-1], new.scale.shape[-1], _block(new)
    group_blocks = 1 if groups == 1 else block // (size // groups)
    return size, block, power_of_two_from(size // 2), groups, group_blocks, new.bits, PRECISIONS[new.x.dtype]


def _block(new: Appended) -> int:
    """Return the elements of a head in a program's tile."""
    return power_of_two_from(new.x.shape[-1])
