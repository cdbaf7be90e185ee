"""Attention of few queries: keys are split over programs, and a second kernel combines what each made of its part.

All queries of the heads that share keys and values are the rows of one tile, so that every key and value is read once,
and tensor cores multiply. Blocks of keys are dealt to the programs in turn, and those before the first and after the
last one in which a mask leaves anything are not read: of a cache that is not full, each program reads its share. Where
every program has one block, all are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import (
    dot,
    let_dependents_start,
    prefetch,
    round_to,
    rounds,
    wait_for_inputs,
)
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from

MOST_SPLITS = 128
COMBINED = 4096  # numbers that a program combines: 32 a thread
SCANNED = 4096  # numbers of a mask that a program looks at together, at most
LINE_BYTES = tl.constexpr(128)  # of the cache
PRECISION = tl.constexpr("ieee")


@triton.jit
def _prefetch_block(tensor, start, end, stride, KEYS: tl.constexpr, SIZE: tl.constexpr, EARLY: tl.constexpr):
    """Start to move keys or values [KEYS, SIZE] from ``start`` on to the L2 cache."""
    LINE: tl.constexpr = LINE_BYTES // (tensor.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(SIZE, LINE))
    key = tl.minimum(start + tl.arange(0, KEYS), end - 1).to(tl.int64)
    column = tl.minimum(tl.arange(0, LINES) * LINE, SIZE - 1)
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
def _load_mask(mask_at, stride, keys, is_mask):
    """Load a mask [rows, keys] and return what is added to scores, -inf for keys that are not attended to."""
    at = mask_at[:, None] + keys[None, :] * stride
    if mask_at.dtype.element_ty == tl.int1:
        added = tl.where(tl.load(at, mask=is_mask, other=0) != 0, 0.0, float("-inf"))
    else:
        added = tl.load(at, mask=is_mask, other=float("-inf")).to(tl.float32)
    return added


@triton.jit
def _exp(x, maximum):
    """Return e^(x - maximum), and zeros where the maximum is that of nothing, -inf."""
    return tl.exp(x - tl.where(maximum == float("-inf"), 0.0, maximum))


@triton.jit
def _quotient(x, total):
    """Return x / total, and zeros where nothing was attended to."""
    return x / tl.where(total == 0, 1.0, total)


@triton.jit
def _attend(
    q,
    k,
    v,
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
    stride_v_batch,
    stride_v_head,
    stride_v,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_query,
    stride_mask,
    K_SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SCANNED_BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend to one block of keys in so many, ONE_BLOCK in all or more.

    ROWS hold the queries of a group; MASK_ROWS is 1 if they share a mask.
    """
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, K_BLOCK)
    is_row = row < group * queries
    k_at = k + batch * stride_k_batch + kv_head * stride_k_head
    v_at = v + batch * stride_v_batch + kv_head * stride_v_head
    head = kv_head * group + row // queries
    q_at = q + batch * stride_q_batch + head * stride_q_head + row % queries * stride_q
    # Of the first block, most keys and values are there since long; what is still written, the cache keeps coherent.
    _prefetch_block(k_at, split * KEYS, keys, stride_k, KEYS, K_SIZE, EARLY)
    _prefetch_block(v_at, split * KEYS, keys, stride_v, KEYS, V_SIZE, EARLY)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    # Of the program's blocks, those that are read. One alone is, whatever a mask leaves of it: to look first would take
    # as long as to load.
    first, last = tl.full((), 0, tl.int32), tl.cdiv(tl.cdiv(keys, KEYS) - split, splits)
    if mask is not None:
        mask_row = tl.arange(0, MASK_ROWS)
        is_mask_row = (mask_row < group * queries)[:, None]
        mask_head = kv_head * group + mask_row // queries
        mask_at = mask + batch * stride_mask_batch + mask_head * stride_mask_head
        mask_at += mask_row % queries * stride_mask_query
        if ONE_BLOCK:
            key = split * KEYS + tl.arange(0, KEYS)
            added = _load_mask(mask_at, stride_mask, key, is_mask_row & (key < keys)[None, :])
        else:
            first, last = last, first
            for scanned in range(rounds(tl.cdiv(first, SCANNED_BLOCKS))):
                place = tl.arange(0, SCANNED_BLOCKS * KEYS)
                block = scanned * SCANNED_BLOCKS + place // KEYS
                key = (split + block * splits) * KEYS + place % KEYS
                is_attended = _load_mask(mask_at, stride_mask, key, is_mask_row & (key < keys)[None, :]) != float(
                    "-inf"
                )
                first = tl.minimum(first, tl.min(tl.where(is_attended, block[None, :], first)))
                last = tl.maximum(last, tl.max(tl.where(is_attended, block[None, :] + 1, 0)))
    q_rows = tl.load(q_at[:, None] + column[None, :], mask=is_row[:, None] & (column < K_SIZE)[None, :], other=0)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, V_BLOCK), tl.float32)
    for block in range(rounds(first), rounds(last)):
        start = (split + block * splits) * KEYS
        key = start + tl.arange(0, KEYS)
        k_rows = _load_block(k_at, start, keys, stride_k, KEYS, K_SIZE, K_BLOCK)
        v_rows = _load_block(v_at, start, keys, stride_v, KEYS, V_SIZE, V_BLOCK)
        scores = dot(q_rows, tl.trans(k_rows), PRECISION) * scale
        if mask is None:
            scores = tl.where((key < keys)[None, :], scores, float("-inf"))
        elif ONE_BLOCK:
            scores += added
        else:
            scores += _load_mask(mask_at, stride_mask, key, is_mask_row & (key < keys)[None, :])
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        # Not exp2 of scores that are scaled by log2(e): with the lowest float32 added, as some masks have it, they
        # would become -inf.
        weights = _exp(scores, larger[:, None])
        shrinkage = _exp(maximum, larger)
        total = total * shrinkage + tl.sum(weights, axis=1)
        mixed = mixed * shrinkage[:, None] + dot(round_to(weights, v_rows.dtype), v_rows, PRECISION)
        maximum = larger
    column = tl.arange(0, V_BLOCK)
    is_result = is_row[:, None] & (column < V_SIZE)[None, :]
    at = pair.to(tl.int64) * (group * queries) + row
    if partial is None:
        result = round_to(_quotient(mixed, total[:, None]), y.dtype.element_ty)
        tl.store(y + at[:, None] * V_SIZE + column[None, :], result, mask=is_result)
    else:
        at = at * splits + split
        tl.store(partial + at[:, None] * V_SIZE + column[None, :], mixed, mask=is_result)
        tl.store(maxima + at, maximum, mask=is_row)
        tl.store(totals + at, total, mask=is_row)


@triton.jit
def _combine(
    partial,
    maxima,
    totals,
    y,
    splits,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Combine the parts of one query of one head, the same way in every run."""
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_split, is_column = split < splits, column < SIZE
    at = row * splits + split
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    maximum = tl.load(maxima + at, mask=is_split, other=float("-inf"))
    total = tl.load(totals + at, mask=is_split, other=0)
    mask = is_split[:, None] & is_column[None, :]
    mixed = tl.load(partial + at[:, None] * SIZE + column[None, :], mask=mask, other=0)
    weights = _exp(maximum, tl.max(maximum, axis=0))
    result = _quotient(tl.sum(mixed * weights[:, None], axis=0), tl.sum(total * weights, axis=0))
    tl.store(y + row * SIZE + column, round_to(result, y.dtype.element_ty), mask=is_column)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, launch: Mapping[str, Any] | None = None
) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    (batch, heads, queries, size), (kv_heads, keys) = q.shape, k.shape[1:3]
    y = q.new_empty((batch, heads, queries, v.shape[-1]))
    if y.numel() == 0 or keys == 0:
        return y.zero_()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    blocks = {"K_BLOCK": power_of_two_from(size), "V_BLOCK": power_of_two_from(v.shape[-1])}
    device, group, pairs = describe(q.device), heads // kv_heads, batch * kv_heads
    rows = power_of_two_from(group * queries)
    if launch is None:
        launch = tiles.nearest("attend", q.device, queries=rows, row_bytes=max(blocks.values()) * k.itemsize)
    launch = dict(launch)
    keys_at_once = launch.pop("KEYS")
    programs = launch.pop("PROGRAMS") * device.multiprocessors
    blocks_of_keys = triton.cdiv(keys, keys_at_once)
    splits = _splits(blocks_of_keys, programs // pairs)
    mask_rows, mask_strides = rows, [0] * 4
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask_strides = list(mask.stride())
        if all(n == 1 or stride == 0 for n, stride in zip(mask.shape[1:3], mask_strides[1:3], strict=True)):
            mask_rows = 1
    each = triton.cdiv(blocks_of_keys, splits)
    most_scanned = max(1, SCANNED // (mask_rows * keys_at_once))
    scanned = min(most_scanned, power_of_two_from(each, smallest=1))
    partial = maxima = totals = None
    if splits > 1:
        maxima, totals = q.new_empty((2, pairs * group * queries, splits), dtype=torch.float32)
        partial = maxima.new_empty((*maxima.shape, v.shape[-1]))
    early = {"EARLY": device.starts_early, "launch_pdl": device.starts_early}
    _attend[(pairs, splits)](
        q, k, v, mask, y, partial, maxima, totals, scale, kv_heads, group, queries, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides,
        K_SIZE=size, V_SIZE=v.shape[-1], **blocks, ROWS=rows, MASK_ROWS=mask_rows, KEYS=keys_at_once,
        ONE_BLOCK=each == 1, SCANNED_BLOCKS=scanned, **early, **launch,
    )  # fmt: skip
    if splits > 1:
        combined = power_of_two_from(splits, smallest=1)
        columns = min(blocks["V_BLOCK"], COMBINED // combined)
        grid = (pairs * group * queries, triton.cdiv(v.shape[-1], columns))
        _combine[grid](
            partial, maxima, totals, y, splits, SIZE=v.shape[-1], SPLITS=combined, COLUMNS=columns, **early
        )  # fmt: skip
    return y


def _splits(blocks: int, programs: int) -> int:
    """Return how many programs share blocks of keys, so many at most: the fewest for which none has more to do."""
    each = triton.cdiv(blocks, max(1, min(programs, MOST_SPLITS)))
    return triton.cdiv(blocks, max(1, each)) or 1
