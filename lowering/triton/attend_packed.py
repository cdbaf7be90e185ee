"""Attention of few queries to packed codes: each warp attends to keys of its own, whose codes stay in its registers.

No number goes through shared memory, and no warp waits for another before the end. What this kernel does not take
(float32, several groups a key, many queries, short heads) is left to that of ``attend``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.attend import attend_rows
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.explicit_layouts import (
    arange,
    exp2,
    full,
    held_as,
    jit,
    multiply_add,
    relabelled,
    result_as_right_operand,
)
from quarot_fx.lowering.triton.language import (
    let_dependents_start,
    prefetch,
    round_pairs_to,
    round_to,
    rounds,
    wait_for_inputs,
)
from quarot_fx.lowering.triton.packed_codes import code_offset
from quarot_fx.lowering.triton.packed_operands import (
    element_of,
    keys_as_operand,
    layouts,
    load_words,
    of_rows,
    places,
    queries_as_operand,
    values_as_operand,
)
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from
from quarot_fx.lowering.triton.split_attention import (
    LOG2_E,
    Parts,
    Rows,
    added,
    expand_mask,
    load_mask,
    quotient,
    split_keys,
)

MMA_COLUMNS = 8
MOST_ROWS = 16  # of queries that share keys
SMALLEST_ROW = 256  # bits of a key or value, of which a thread takes 64 or 32
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


@jit
def _attend_packed(
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
    stride_k_scale_batch,
    stride_k_scale_head,
    stride_k_scale,
    stride_v_batch,
    stride_v_head,
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
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WARPS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SCANNED_BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
    PRODUCT: tl.constexpr,
    Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    V_NEIGHBOURS: tl.constexpr,
    KEY_LAYOUT: tl.constexpr,
    LINE_LAYOUT: tl.constexpr,
    MASK_LAYOUT: tl.constexpr,
):
    """Attend to one block of KEYS for each of WARPS warps in so many, ONE_BLOCK in all or more.

    K_ROW and V_ROW are words from key to key, ROWS hold the queries of a group; MASK_ROWS is 1 if they share a mask.

    A score is ``scale (q.c - zero sum(q))`` in units of log(2), and what is mixed ``sum(p' c) - sum(p' zero)`` of
    weights ``p' = p scale``, which are rounded once for both sums.
    """
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    K_WORDS: tl.constexpr = K_BLOCK * K_BITS // 32
    V_WORDS: tl.constexpr = V_BLOCK * V_BITS // 32
    BLOCK: tl.constexpr = WARPS * KEYS
    k = k.to(tl.pointer_type(tl.int32)) + (batch * stride_k_batch + kv_head * stride_k_head) // 4
    v = v.to(tl.pointer_type(tl.int32)) + (batch * stride_v_batch + kv_head * stride_v_head) // 4
    # Of the first block, most keys and values are there since long; what is still written, the cache keeps coherent.
    first_keys = tl.minimum(split * BLOCK + arange(BLOCK, LINE_LAYOUT), keys - 1).to(tl.int64)
    prefetch(k + first_keys * K_ROW, EARLY)
    prefetch(v + first_keys * V_ROW, EARLY)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    k_scale += batch * stride_k_scale_batch + kv_head * stride_k_scale_head
    k_zero += batch * stride_k_scale_batch + kv_head * stride_k_scale_head
    v_scale += batch * stride_v_scale_batch + kv_head * stride_v_scale_head
    v_zero += batch * stride_v_scale_batch + kv_head * stride_v_scale_head
    # Of the program's blocks, those that are read. One alone is, whatever a mask leaves of it: to look first would take
    # as long as to load.
    first, last = split - split, tl.cdiv(tl.cdiv(keys, BLOCK) - split, splits)
    if mask is not None:
        IS_BOOLEAN: tl.constexpr = mask.dtype.element_ty == tl.int1
        mask += batch * stride_mask_batch
        if not ONE_BLOCK:
            mask_row = arange(MASK_ROWS, gl.SliceLayout(0, MASK_LAYOUT))
            is_mask_row = (mask_row < group * queries)[None, :]
            mask_at = mask + (kv_head * group + mask_row // queries) * stride_mask_head
            mask_at += mask_row % queries * stride_mask_query
            place = arange(SCANNED_BLOCKS * BLOCK, gl.SliceLayout(1, MASK_LAYOUT))
            first, last = last, first
            for scanned in range(rounds(tl.cdiv(first, SCANNED_BLOCKS))):
                block = scanned * SCANNED_BLOCKS + place // BLOCK
                looked_at = (split + block * splits) * BLOCK + place % BLOCK
                seen = load_mask(mask_at, stride_mask, looked_at, (looked_at < keys)[:, None] & is_mask_row)
                is_attended = added(seen, IS_BOOLEAN) != float("-inf")
                first = tl.minimum(first, tl.min(tl.min(tl.where(is_attended, block[:, None], first), axis=1), axis=0))
                ends = tl.where(is_attended, block[:, None] + 1, 0)
                last = tl.maximum(last, tl.max(tl.max(ends, axis=1), axis=0))
    row = arange(ROWS, gl.SliceLayout(0, gl.SliceLayout(2, Q_LAYOUT)))[None, :, None]
    column = arange(K_BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, Q_LAYOUT)))[None, None, :]
    q_at = q + batch * stride_q_batch + (kv_head * group + row // queries) * stride_q_head + row % queries * stride_q
    q_rows = tl.load(
        tl.broadcast_to(q_at + column, (WARPS, ROWS, K_BLOCK)),
        mask=tl.broadcast_to((row < group * queries) & (column < K_SIZE), (WARPS, ROWS, K_BLOCK)),
        other=0,
    )
    q_sum = held_as(tl.sum(q_rows.to(tl.float32), axis=2), gl.SliceLayout(1, PRODUCT))[:, None, :]
    q_rows = queries_as_operand(q_rows, K_BITS)
    k_first, k_further, k_word = places(K_WORDS, WARPS, KEYS, 1, K_LAYOUT)
    v_first, v_further, v_word = places(V_WORDS, WARPS, KEYS, 2, V_LAYOUT)
    warp = arange(WARPS, gl.SliceLayout(1, gl.SliceLayout(2, KEY_LAYOUT)))[:, None, None]
    eighth = arange(8, gl.SliceLayout(0, gl.SliceLayout(2, KEY_LAYOUT)))[None, :, None]
    neighbour = arange(KEYS // 8, gl.SliceLayout(0, gl.SliceLayout(1, KEY_LAYOUT)))[None, None, :]
    key = warp * KEYS + eighth * (KEYS // 8) + neighbour
    if mask is not None:
        if MASK_ROWS == 1:
            mask_place = kv_head * group * stride_mask_head + key * stride_mask
            mask_key, is_mask_row = key, True
        else:
            mask_row = arange(ROWS, gl.SliceLayout(0, gl.SliceLayout(1, PRODUCT)))[None, None, :]
            mask_key = of_rows(key, PRODUCT)
            mask_place = (
                kv_head * group + mask_row // queries
            ) * stride_mask_head + mask_row % queries * stride_mask_query
            mask_place += mask_key * stride_mask
            is_mask_row = mask_row < group * queries
        NO_MASK: tl.constexpr = 0 if IS_BOOLEAN else float("-inf")
    maximum = full((WARPS, ROWS), float("-inf"), tl.float32, gl.SliceLayout(1, PRODUCT))
    totals_of_keys = full((WARPS, KEYS, ROWS), 0, tl.float32, PRODUCT)  # added up in the end, which costs less
    origins_of_keys = full((WARPS, KEYS, ROWS), 0, tl.float32, PRODUCT)
    mixed = full((WARPS, V_BLOCK, ROWS), 0, tl.float32, PRODUCT)
    no_values = full((WARPS, V_BLOCK, ROWS), 0, tl.float32, PRODUCT)
    # What is multiplied has been loaded one round before.
    start = (split + first * splits) * BLOCK
    limit = tl.where(first < last, keys, 0)
    k_words = load_words(k, start, limit, k_first, k_further, k_word, K_ROW, K_SIZE * K_BITS // 32)
    v_words = load_words(v, start, limit, v_first, v_further, v_word, V_ROW, V_SIZE * V_BITS // 32)
    is_key = start + key < limit
    at = start.to(tl.int64) * stride_k_scale + key * stride_k_scale
    k_factor, k_origin = tl.load(k_scale + at, mask=is_key, other=0), tl.load(k_zero + at, mask=is_key, other=0)
    at = start.to(tl.int64) * stride_v_scale + key * stride_v_scale
    v_factor, v_origin = tl.load(v_scale + at, mask=is_key, other=0), tl.load(v_zero + at, mask=is_key, other=0)
    if mask is not None:
        is_masked = (start + mask_key < limit) & is_mask_row
        loaded = tl.load(mask + start.to(tl.int64) * stride_mask + mask_place, mask=is_masked, other=NO_MASK)
    for block in range(rounds(first), rounds(last)):
        following = start + splits * BLOCK
        limit = tl.where(block + 1 < last, keys, 0)
        origin = of_rows(k_origin.to(tl.float32) + code_offset(K_BITS, dtype), PRODUCT)
        scores = multiply_add(keys_as_operand(k_words, K_BITS, dtype), q_rows, -origin * q_sum, PRODUCT)
        k_words = load_words(k, following, limit, k_first, k_further, k_word, K_ROW, K_SIZE * K_BITS // 32)
        factor = of_rows(k_factor * scale, PRODUCT)
        if mask is None:
            shift = of_rows(tl.where(start + key < keys, 0.0, float("-inf")), PRODUCT)
        else:
            shift = added(loaded, IS_BOOLEAN)
            if not IS_BOOLEAN:  # of what some masks add, the lowest float32, a multiple would be -inf
                shift = tl.where(shift == float("-inf"), shift, tl.maximum(shift * LOG2_E, LOWEST))
            if MASK_ROWS == 1:
                shift = of_rows(shift, PRODUCT)
        scores = scores * factor + shift
        next_is_key = following + key < limit
        at = following.to(tl.int64) * stride_k_scale + key * stride_k_scale
        k_factor, k_origin = (
            tl.load(k_scale + at, mask=next_is_key, other=0),
            tl.load(k_zero + at, mask=next_is_key, other=0),
        )
        if mask is not None:
            is_masked = (following + mask_key < limit) & is_mask_row
            loaded = tl.load(mask + following.to(tl.int64) * stride_mask + mask_place, mask=is_masked, other=NO_MASK)
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weights = exp2(scores - finite[:, None, :])
        shrinkage = exp2(maximum - finite)[:, None, :]
        maximum = larger
        totals_of_keys = totals_of_keys * shrinkage + weights
        if dtype == tl.float16:  # its range: weights are at most 1 in units of the largest factor
            unit = tl.max(tl.max(v_factor, axis=2), axis=1)
            unit = held_as(tl.where(unit == 0, 1.0, unit), gl.SliceLayout(1, gl.SliceLayout(2, PRODUCT)))[:, None, None]
        else:
            unit = 1.0
        weights = round_pairs_to(weights * (of_rows(v_factor, PRODUCT) / unit), dtype)
        origin = of_rows(v_origin.to(tl.float32) + code_offset(V_BITS, dtype), PRODUCT) * unit
        origins_of_keys = origins_of_keys * shrinkage + weights.to(tl.float32) * origin
        at = following.to(tl.int64) * stride_v_scale + key * stride_v_scale
        v_factor, v_origin = (
            tl.load(v_scale + at, mask=next_is_key, other=0),
            tl.load(v_zero + at, mask=next_is_key, other=0),
        )
        values = values_as_operand(relabelled(v_words, V_NEIGHBOURS), V_BITS, dtype)
        weights = result_as_right_operand(weights)
        if dtype == tl.float16:
            mixed = mixed * shrinkage + multiply_add(values, weights, no_values, PRODUCT) * unit
        else:
            mixed = multiply_add(values, weights, mixed * shrinkage, PRODUCT)
        v_words = load_words(v, following, limit, v_first, v_further, v_word, V_ROW, V_SIZE * V_BITS // 32)
        start = following
    mixed -= tl.sum(origins_of_keys, axis=1)[:, None, :]
    most = tl.max(maximum, axis=0)
    share = exp2(maximum - tl.where(most == float("-inf"), 0.0, most)[None, :])
    total = tl.sum(tl.sum(totals_of_keys, axis=1) * share, axis=0)
    mixed = tl.sum(mixed * share[:, None, :], axis=0)
    OF_ROWS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, PRODUCT))
    most, total, row = held_as(most, OF_ROWS), held_as(total, OF_ROWS), arange(ROWS, OF_ROWS)
    column = element_of(arange(V_BLOCK, gl.SliceLayout(1, gl.SliceLayout(0, PRODUCT))), V_BLOCK, V_BITS)
    is_row = row < group * queries
    is_result = (column < V_SIZE)[:, None] & is_row[None, :]
    at = pair.to(tl.int64) * (group * queries) + row
    if partial is None:
        result = round_to(quotient(mixed, total[None, :]), y.dtype.element_ty)
        tl.store(y + at[None, :] * V_SIZE + column[:, None], result, mask=is_result)
    else:
        at = at * splits + split
        tl.store(partial + at[None, :] * V_SIZE + column[:, None], mixed, mask=is_result)
        tl.store(maxima + at, most * (1 / LOG2_E), mask=is_row)
        tl.store(totals + at, total, mask=is_row)


def attend_packed(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    v_size: int,
    launch: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    k = Rows(k_codes, q.shape[-1], k_bits, k_scale, k_zero)
    v = Rows(v_codes, v_size, v_bits, v_scale, v_zero)
    rows = max(MMA_COLUMNS, power_of_two_from(q.shape[1] // k_codes.shape[1] * q.shape[2], smallest=1))
    if not _fits(q, k, v, rows):
        return attend_rows(q, k, v, mask, scale, launch)
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k_codes.shape[1:3]
    y = q.new_empty((batch, heads, queries, v_size))
    if y.numel() == 0 or keys == 0:
        return y.zero_()
    q, k, v = q if q.stride(-1) == 1 else q.contiguous(), k.in_place(), v.in_place()
    device, group, pairs = describe(q.device), heads // kv_heads, batch * kv_heads
    if launch is None:
        row_bytes = max(k.block, v.block) * max(k_bits, v_bits) // 8
        launch = tiles.nearest("attend_packed", q.device, queries=rows, row_bytes=row_bytes, heads=pairs, keys=keys)
    launch = dict(launch)
    keys_of_warp, warps, programs = launch.pop("KEYS"), launch["num_warps"], launch.pop("PROGRAMS")
    split = split_keys(triton.cdiv(keys, keys_of_warp * warps), programs * device.multiprocessors // pairs)
    mask, mask_rows, mask_strides = expand_mask(mask, q, keys, rows)
    parts = Parts.of(y, pairs * group * queries, split.programs)
    strides = [(*x.numbers.stride()[:2], *x.scale.stride()[:3]) for x in (k, v) if x.scale is not None]
    _attend_packed[(pairs, split.programs)](
        q, k.numbers, k.scale, k.zero, v.numbers, v.scale, v.zero, mask, y, parts.mixed, parts.maxima, parts.totals,
        scale * LOG2_E.value, kv_heads, group, queries, keys,
        *q.stride()[:3], *chain.from_iterable(strides), *mask_strides,
        K_SIZE=k.size, V_SIZE=v.size, K_BLOCK=k.block, V_BLOCK=v.block, K_BITS=k_bits, V_BITS=v_bits,
        K_ROW=k.numbers.stride(2) // 4, V_ROW=v.numbers.stride(2) // 4,
        ROWS=rows, MASK_ROWS=mask_rows, KEYS=keys_of_warp, WARPS=warps, ONE_BLOCK=split.each == 1,
        SCANNED_BLOCKS=split.scanned_blocks(mask_rows * keys_of_warp * warps),
        EARLY=device.starts_early, launch_pdl=device.starts_early,
        **layouts(rows, k.block, k.block * k_bits // 32, v.block * v_bits // 32, warps, keys_of_warp), **launch,
    )  # fmt: skip
    parts.combine_into(y)
    return y


def _fits(q: Tensor, k: Rows, v: Rows, rows: int) -> bool:
    """Whether ``mma`` takes these numbers, and a thread has whole words of each key and value."""
    has_words = all(x.block * x.bits >= SMALLEST_ROW and x.group == x.size for x in (k, v))
    return q.dtype != torch.float32 and rows <= MOST_ROWS and has_words
