"""Attention of few queries: keys are split over programs, and a second kernel combines what each made of its part.

All queries of the heads that share keys and values are the rows of one tile, so that every key and value is read once,
and tensor cores multiply. Blocks of keys are dealt to the programs in turn, and those before the first and after the
last one in which a mask leaves anything are not read: of a cache that is not full, each program reads its share. Where
every program has one block, all are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, let_dependents_start, prefetch, round_to, rounds, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import code_at, code_offset, codes_as_floats
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from
from quarot_fx.lowering.triton.split_attention import (
    Parts,
    Rows,
    added,
    exp,
    expand_mask,
    load_mask,
    quotient,
    split_keys,
)

LINE_BYTES = tl.constexpr(128)  # of the cache
PRECISION = tl.constexpr("ieee")


@triton.jit
def _elements(SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Return which elements of a key or value the columns of a block are, and whether there are such elements."""
    column = tl.arange(0, BLOCK)
    if BITS < 16:
        column = code_at(column, BITS)
    return column, column < SIZE


@triton.jit
def _prefetch_block(
    tensor, start, end, stride, KEYS: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr
):
    """Start to move keys or values of SIZE elements from ``start`` on to the L2 cache."""
    NUMBERS: tl.constexpr = SIZE if BITS == 16 else (SIZE * BITS + 7) // 8
    LINE: tl.constexpr = LINE_BYTES // (tensor.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(NUMBERS, LINE))
    key = tl.minimum(start + tl.arange(0, KEYS), end - 1).to(tl.int64)
    column = tl.minimum(tl.arange(0, LINES) * LINE, NUMBERS - 1)
    prefetch(tensor + key[:, None] * stride + column[None, :], EARLY)


@triton.jit
def _load_block(tensor, start, end, stride, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load keys or values [KEYS, BLOCK] from ``start`` on; from ``end`` and SIZE on there are zeros."""
    key, column = tl.arange(0, KEYS), tl.arange(0, BLOCK)
    mask = (start + key < end)[:, None]
    if SIZE < BLOCK:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(tensor + start.to(tl.int64) * stride + key[:, None] * stride + column[None, :], mask=mask, other=0)


@triton.jit
def _load_codes(
    codes,
    scale,
    zero,
    start,
    end,
    stride,
    stride_scale,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    dtype: tl.constexpr,
):
    """Load packed keys or values [KEYS, BLOCK] as floats: numbers where each has several groups, else codes."""
    CODES: tl.constexpr = 32 // BITS  # of a word
    GROUPS: tl.constexpr = SIZE // GROUP
    words_at = codes.to(tl.pointer_type(tl.int32))
    words = _load_block(words_at, start, end, stride // 4, KEYS, SIZE // CODES, BLOCK // CODES)
    floats = codes_as_floats(words, BITS, dtype)
    if GROUPS > 1:
        GROUP_BLOCKS: tl.constexpr = BLOCK // GROUP
        key, group = tl.arange(0, KEYS), tl.arange(0, GROUP_BLOCKS)
        at = start.to(tl.int64) * stride_scale + key[:, None] * stride_scale + group[None, :]
        is_group = (start + key < end)[:, None] & (group < GROUPS)[None, :]
        factors = tl.load(scale + at, mask=is_group, other=0)
        origins = tl.load(zero + at, mask=is_group, other=0).to(tl.float32) + code_offset(BITS, dtype)
        grouped = tl.reshape(floats.to(tl.float32), (KEYS, GROUP_BLOCKS, GROUP))
        grouped = (grouped - origins[:, :, None]) * factors[:, :, None]
        floats = round_to(tl.reshape(grouped, (KEYS, BLOCK)), dtype)
    return floats


@triton.jit
def _load_scales(scale, zero, start, end, stride, KEYS: tl.constexpr):
    """Load the scale and the zero point of keys or values that have one each."""
    key = tl.arange(0, KEYS)
    at, is_key = start.to(tl.int64) * stride + key * stride, start + key < end
    return tl.load(scale + at, mask=is_key, other=0), tl.load(zero + at, mask=is_key, other=0)


@triton.jit
def _attend(
    q,
    k,
    k_scale,
    k_zero,
    v,
    v_scale,
    v_zero,
    mask,
    y,
    partial,
    maxima,
    totals,
    scale,
    kv_heads,
    group,
    queries,
    keys,
    stride_q_batch,
    stride_q_head,
    stride_q,
    stride_k_batch,
    stride_k_head,
    stride_k,
    stride_k_scale_batch,
    stride_k_scale_head,
    stride_k_scale,
    stride_v_batch,
    stride_v_head,
    stride_v,
    stride_v_scale_batch,
    stride_v_scale_head,
    stride_v_scale,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_query,
    stride_mask,
    K_SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SCANNED_BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend to one block of keys in so many, ONE_BLOCK in all or more.

    ROWS hold the queries of a group; MASK_ROWS is 1 if they share a mask.

    Packed keys and values with one scale each are multiplied as integers: a score is ``scale (q.c - zero sum(q))``, and
    what is mixed ``sum(p' c) - sum(p' zero)`` of weights ``p' = p scale``, which are rounded once for both sums.
    """
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    K_IS_SCALED: tl.constexpr = K_BITS < 16 and K_GROUP == K_SIZE
    V_IS_SCALED: tl.constexpr = V_BITS < 16 and V_GROUP == V_SIZE
    row = tl.arange(0, ROWS)
    column, is_column = _elements(K_SIZE, K_BLOCK, K_BITS)
    is_row = row < group * queries
    k_at = k + batch * stride_k_batch + kv_head * stride_k_head
    v_at = v + batch * stride_v_batch + kv_head * stride_v_head
    head = kv_head * group + row // queries
    q_at = q + batch * stride_q_batch + head * stride_q_head + row % queries * stride_q
    # Of the first block, most keys and values are there since long; what is still written, the cache keeps coherent.
    _prefetch_block(k_at, split * KEYS, keys, stride_k, KEYS, K_SIZE, K_BITS, EARLY)
    _prefetch_block(v_at, split * KEYS, keys, stride_v, KEYS, V_SIZE, V_BITS, EARLY)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    if K_BITS < 16:
        k_scale += batch * stride_k_scale_batch + kv_head * stride_k_scale_head
        k_zero += batch * stride_k_scale_batch + kv_head * stride_k_scale_head
    if V_BITS < 16:
        v_scale += batch * stride_v_scale_batch + kv_head * stride_v_scale_head
        v_zero += batch * stride_v_scale_batch + kv_head * stride_v_scale_head
    # Of the program's blocks, those that are read. One alone is, whatever a mask leaves of it: to look first would take
    # as long as to load.
    first, last = tl.full((), 0, tl.int32), tl.cdiv(tl.cdiv(keys, KEYS) - split, splits)
    if mask is not None:
        mask_row = tl.arange(0, MASK_ROWS)
        is_mask_row = (mask_row < group * queries)[None, :]
        mask_head = kv_head * group + mask_row // queries
        mask_at = mask + batch * stride_mask_batch + mask_head * stride_mask_head
        mask_at += mask_row % queries * stride_mask_query
        IS_BOOLEAN: tl.constexpr = mask.dtype.element_ty == tl.int1
        if not ONE_BLOCK:
            first, last = last, first
            for scanned in range(rounds(tl.cdiv(first, SCANNED_BLOCKS))):
                place = tl.arange(0, SCANNED_BLOCKS * KEYS)
                block = scanned * SCANNED_BLOCKS + place // KEYS
                key = (split + block * splits) * KEYS + place % KEYS
                loaded = load_mask(mask_at, stride_mask, key, (key < keys)[:, None] & is_mask_row)
                is_attended = added(loaded, IS_BOOLEAN) != float("-inf")
                first = tl.minimum(first, tl.min(tl.where(is_attended, block[:, None], first)))
                last = tl.maximum(last, tl.max(tl.where(is_attended, block[:, None] + 1, 0)))
    q_rows = tl.load(q_at[None, :] + column[:, None], mask=is_column[:, None] & is_row[None, :], other=0)
    if K_IS_SCALED:
        q_sum = tl.sum(q_rows.to(tl.float32), axis=0)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    totals_of_keys = tl.zeros((KEYS, ROWS), tl.float32)  # added up in the end, which costs less
    mixed = tl.zeros((V_BLOCK, ROWS), tl.float32)
    origins_of_keys = tl.zeros((KEYS, ROWS), tl.float32)
    # What is small is loaded one round before it is used: copies to shared memory, which Triton starts early, are no
    # smaller than four bytes a thread.
    start = (split + first * splits) * KEYS
    if K_IS_SCALED:
        next_k_factor, next_k_origin = _load_scales(k_scale, k_zero, start, keys, stride_k_scale, KEYS)
    if V_IS_SCALED:
        next_v_factor, next_v_origin = _load_scales(v_scale, v_zero, start, keys, stride_v_scale, KEYS)
    if mask is not None:
        key = start + tl.arange(0, KEYS)
        next_mask = load_mask(mask_at, stride_mask, key, (key < keys)[:, None] & is_mask_row)
    for block in range(rounds(first), rounds(last)):
        start = (split + block * splits) * KEYS
        following = start + splits * KEYS
        key = following + tl.arange(0, KEYS)
        if K_IS_SCALED:
            k_factor, k_origin = next_k_factor, next_k_origin
            next_k_factor, next_k_origin = _load_scales(k_scale, k_zero, following, keys, stride_k_scale, KEYS)
        if V_IS_SCALED:
            v_factor, v_origin = next_v_factor, next_v_origin
            next_v_factor, next_v_origin = _load_scales(v_scale, v_zero, following, keys, stride_v_scale, KEYS)
        if mask is not None:
            loaded = next_mask
            next_mask = load_mask(mask_at, stride_mask, key, (key < keys)[:, None] & is_mask_row)
        if K_BITS < 16:
            k_rows = _load_codes(
                k_at, k_scale, k_zero, start, keys, stride_k, stride_k_scale,
                KEYS, K_SIZE, K_BLOCK, K_BITS, K_GROUP, dtype,
            )  # fmt: skip
        else:
            k_rows = _load_block(k_at, start, keys, stride_k, KEYS, K_SIZE, K_BLOCK)
        scores = dot(k_rows, q_rows, PRECISION)
        if K_IS_SCALED:
            origin = k_origin.to(tl.float32) + code_offset(K_BITS, dtype)
            scores = (scores - origin[:, None] * q_sum[None, :]) * (k_factor * scale)[:, None]
        else:
            scores *= scale
        if mask is not None:
            scores += added(loaded, IS_BOOLEAN)
        else:
            scores = tl.where((start + tl.arange(0, KEYS) < keys)[:, None], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, axis=0))
        # Differences are scaled by log2(e), not scores: with the lowest float32 added, as some masks have it, these
        # would become -inf.
        weights = exp(scores, larger[None, :])
        shrinkage = exp(maximum, larger)[None, :]
        totals_of_keys = totals_of_keys * shrinkage + weights
        if V_BITS < 16:
            v_rows = _load_codes(
                v_at, v_scale, v_zero, start, keys, stride_v, stride_v_scale,
                KEYS, V_SIZE, V_BLOCK, V_BITS, V_GROUP, dtype,
            )  # fmt: skip
        else:
            v_rows = _load_block(v_at, start, keys, stride_v, KEYS, V_SIZE, V_BLOCK)
        if V_IS_SCALED:
            if dtype == tl.float16:  # its range: weights are at most 1 in units of the largest factor
                unit = tl.max(v_factor, axis=0)
                unit = tl.where(unit == 0, 1.0, unit)
            else:
                unit = 1.0
            weights = round_to(weights * (v_factor / unit)[:, None], dtype)
            mixed = mixed * shrinkage + dot(tl.trans(v_rows), weights, PRECISION) * unit
            origin = (v_origin.to(tl.float32) + code_offset(V_BITS, dtype)) * unit
            origins_of_keys = origins_of_keys * shrinkage + weights.to(tl.float32) * origin[:, None]
        else:
            mixed = mixed * shrinkage + dot(tl.trans(v_rows), round_to(weights, dtype), PRECISION)
        maximum = larger
    total = tl.sum(totals_of_keys, axis=0)
    if V_IS_SCALED:
        mixed -= tl.sum(origins_of_keys, axis=0)[None, :]
    column, is_column = _elements(V_SIZE, V_BLOCK, V_BITS)
    is_result = is_column[:, None] & is_row[None, :]
    at = pair.to(tl.int64) * (group * queries) + row
    if partial is None:
        result = round_to(quotient(mixed, total[None, :]), y.dtype.element_ty)
        tl.store(y + at[None, :] * V_SIZE + column[:, None], result, mask=is_result)
    else:
        at = at * splits + split
        tl.store(partial + at[None, :] * V_SIZE + column[:, None], mixed, mask=is_result)
        tl.store(maxima + at, maximum, mask=is_row)
        tl.store(totals + at, total, mask=is_row)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, launch: Mapping[str, Any] | None = None
) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    return attend_rows(q, Rows(k, k.shape[-1]), Rows(v, v.shape[-1]), mask, scale, launch)


def attend_rows(
    q: Tensor, k: Rows, v: Rows, mask: Tensor | None, scale: float, launch: Mapping[str, Any] | None = None
) -> Tensor:
    """Return the attention of q [batch, heads, queries, size] to keys and values, packed or not."""
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.numbers.shape[1:3]
    y = q.new_empty((batch, heads, queries, v.size))
    if y.numel() == 0 or keys == 0:
        return y.zero_()
    q, k, v = q if q.stride(-1) == 1 else q.contiguous(), k.in_place(), v.in_place()
    blocks = {"K_BLOCK": k.block, "V_BLOCK": v.block}
    device, group, pairs = describe(q.device), heads // kv_heads, batch * kv_heads
    rows = power_of_two_from(group * queries)
    if launch is None:
        kernel, bits = ("attend", 8 * q.itemsize) if k.bits == 16 else ("attend_codes", max(k.bits, v.bits))
        launch = tiles.nearest(kernel, q.device, queries=rows, row_bytes=max(blocks.values()) * bits // 8)
    launch = dict(launch)
    keys_at_once = launch.pop("KEYS")
    programs = launch.pop("PROGRAMS") * device.multiprocessors
    split = split_keys(triton.cdiv(keys, keys_at_once), programs // pairs)
    if split.each == 1:
        launch["num_stages"] = 1  # no next block is loaded meanwhile
    mask, mask_rows, mask_strides = expand_mask(mask, q, keys, rows)
    parts = Parts.of(y, pairs * group * queries, split.programs)
    early = {"EARLY": device.starts_early, "launch_pdl": device.starts_early}
    strides = [
        [0, 0, 0] if tensor is None else tensor.stride()[:3] for tensor in (k.numbers, k.scale, v.numbers, v.scale)
    ]
    _attend[(pairs, split.programs)](
        q, k.numbers, k.scale, k.zero, v.numbers, v.scale, v.zero, mask, y, parts.mixed, parts.maxima, parts.totals,
        scale, kv_heads, group, queries, keys, *q.stride()[:3], *chain.from_iterable(strides), *mask_strides,
        K_SIZE=k.size, V_SIZE=v.size, **blocks, K_BITS=k.bits, V_BITS=v.bits, K_GROUP=k.group, V_GROUP=v.group,
        ROWS=rows, MASK_ROWS=mask_rows, KEYS=keys_at_once, ONE_BLOCK=split.each == 1,
        SCANNED_BLOCKS=split.scanned_blocks(mask_rows * keys_at_once), **early, **launch,
    )  # fmt: skip
    parts.combine_into(y)
    return y
