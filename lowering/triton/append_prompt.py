"""Keys or values of a prompt are embedded, balanced, rotated, quantised, packed and stored: ``append`` for many tokens.

A program takes TOKENS of several heads, one after the other, so that the matrix is loaded once and angles are found in
a close cache; a head is loaded while the one before it is worked on. Four threads have a row, a quarter each: as many
threads have a row of a tensor core's product. So a row goes from memory through the product to its codes without
shared memory, what there is to do once a row is done four times instead of sixteen, and a thread has whole words of
codes. Ranges and codes are found two at a time (``pairs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from quarot_fx.lowering.triton.appended import Appended
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import (
    INTERPRETED,
    divide_scalars,
    dot,
    let_dependents_start,
    negative,
    round_to,
    wait_for_inputs,
)
from quarot_fx.lowering.triton.pairs import (
    added_and_clamped,
    even_of,
    last_halves,
    odd_of,
    pairs_of,
    range_of_rows,
    rounded_pairs,
    twice,
    with_magic_number,
)
from quarot_fx.lowering.triton.quantization import LARGEST, ROUND_TO_INTEGER, low_byte
from quarot_fx.lowering.triton.rope_rotate import matrix_of_head
from quarot_fx.lowering.triton.rotate import PRECISIONS
from quarot_fx.lowering.triton.rotation_matrices import head_matrices_by_thread

DTYPES = (torch.bfloat16, torch.float16)
SIZES = (64, 128)  # of a head
TOKENS = 64  # of a tile: rows of a product of four warps
THREADS = tl.constexpr(4)  # of a row
NEIGHBOURS = tl.constexpr(8)  # elements that a thread loads at once
HEADS = (8, 4)  # that a program takes one after the other, if all programs have work then
PROGRAMS = 3  # on a multiprocessor that take several heads, as many as registers allow; with fewer the latency shows
WORD = tl.constexpr(32)  # bits of a word of codes
SMALLEST_CLIP = 1 / 32  # quotients of 8 bits by a smaller one may not fit 16


@triton.jit
def _append_prompt(
    keys, values, key_programs, KEYS: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr
):
    """Append keys or values, of which ``key_programs`` take heads, and others, if there are any."""
    index = tl.program_id(1)
    if VALUES is None or index < key_programs:
        _append_heads(*keys, index, KEYS, TOKENS, EARLY)
    else:
        _append_heads(*values, index - key_programs, VALUES, TOKENS, EARLY)


@triton.jit
def _append_heads(
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
    index,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take TOKENS of HEADS heads of SIZE elements, which have GROUPS groups. The first ``skipped`` are not stored."""
    SIZE: tl.constexpr = SCHEME[0]
    GROUPS: tl.constexpr = SCHEME[1]
    BITS: tl.constexpr = SCHEME[2]
    PRECISION: tl.constexpr = SCHEME[3]
    HEADS: tl.constexpr = SCHEME[4]
    HALF: tl.constexpr = SIZE // 2
    IN_HALVES: tl.constexpr = matrix is not None
    CODES: tl.constexpr = WORD // BITS  # of a word
    dtype: tl.constexpr = x.dtype.element_ty
    first_head = index * HEADS
    batch, head = (first_head // heads).to(tl.int64), (first_head % heads).to(tl.int64)
    start = tl.program_id(0) * TOKENS
    token, element = start + tl.arange(0, TOKENS), tl.arange(0, SIZE)
    if matrix is not None:
        matrix_at = matrix_of_head(matrix, head, sharing, SIZE) + tl.arange(0, HALF)[:, None] * SIZE + element[None, :]
        upper, lower = tl.load(matrix_at), tl.load(matrix_at + HALF * SIZE)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    place = tl.load(position + token - skipped, mask=(token >= skipped) & (token < tokens), other=-1)
    is_stored = ((place >= 0) & (place < capacity))[:, None]
    head_at = x + batch * stride_batch + head * stride_head
    angles = batch * stride_angles
    next_first, next_second = _load_head(head_at, start, tokens, stride_token, TOKENS, SIZE, IN_HALVES)
    for later in range(HEADS):
        first, second = next_first, next_second
        if later + 1 < HEADS:
            head_at += stride_head
            next_first, next_second = _load_head(head_at, start, tokens, stride_token, TOKENS, SIZE, IN_HALVES)
        if matrix is None:
            pairs = first
        else:
            if cos is not None:
                cos_first, cos_second = _load_head(cos + angles, start, tokens, SIZE, TOKENS, SIZE, IN_HALVES)
                sin_first, sin_second = _load_head(sin + angles, start, tokens, SIZE, TOKENS, SIZE, IN_HALVES)
                first, second = _embedded(first, second, cos_first, cos_second, sin_first, sin_second, dtype)
            product = dot(_operand(first, dtype), upper, PRECISION) + dot(_operand(second, dtype), lower, PRECISION)
            pairs = _result(product, norm, dtype)
        pairs = tl.reshape(pairs, (TOKENS * GROUPS, HALF // GROUPS))
        step, zeros, even, odd = _encode(pairs, clip, BITS, dtype)
        places = tl.arange(0, CODES // 4)[None, None, :] * (2 * BITS)
        words = tl.reshape(tl.sum((even << places) + (odd << (places + BITS)), axis=2), (TOKENS, SIZE // CODES))
        this_head = head + later
        if y is not None:
            numbers = tl.reshape(tl.join(_decoded(even, zeros, step), _decoded(odd, zeros, step)), (TOKENS, SIZE))
            at = (batch * heads + this_head) * tokens * SIZE + token[:, None] * SIZE + element[None, :]
            tl.store(y + at, round_to(numbers, dtype), mask=(token < tokens)[:, None])
        at = codes + batch * stride_codes_batch + this_head * stride_codes_head + place[:, None] * stride_codes
        tl.store(at + tl.arange(0, SIZE // CODES)[None, :], words, mask=is_stored)
        at = scale + batch * stride_scale_batch + this_head * stride_scale_head + place * stride_scale
        _store_of_groups(at, step, is_stored, GROUPS)
        at = zero + batch * stride_zero_batch + this_head * stride_zero_head + place * stride_zero
        _store_of_groups(at, low_byte(zeros), is_stored, GROUPS)


# -- loading ---------------------------------------------------------------------------------------


@triton.jit
def _load_head(at, start, tokens, stride_token, TOKENS: tl.constexpr, SIZE: tl.constexpr, IN_HALVES: tl.constexpr):
    """Return both halves of a head as pairs [TOKENS, SIZE / 4], or all of it twice."""
    at += start.to(tl.int64) * stride_token
    last = tokens - start - 1
    if IN_HALVES:
        first = _load_rows(at, last, stride_token, TOKENS, SIZE // 2)
        second = _load_rows(at + SIZE // 2, last, stride_token, TOKENS, SIZE // 2)
    else:
        first = _load_rows(at, last, stride_token, TOKENS, SIZE)
        second = first
    return first, second


@triton.jit
def _load_rows(at, last, stride_token, TOKENS: tl.constexpr, SIZE: tl.constexpr):
    """Return SIZE elements of each token as pairs; those after the last token are the last one's."""
    # Threads are given out along the first axes: THREADS to a row, then to rows.
    row = tl.minimum(tl.arange(0, TOKENS), last)[None, :, None, None]
    quarter = tl.arange(0, THREADS)[:, None, None, None] * (SIZE // THREADS)
    loads: tl.constexpr = SIZE // THREADS // NEIGHBOURS
    within = (tl.arange(0, loads) * NEIGHBOURS)[None, None, :, None] + tl.arange(0, NEIGHBOURS)[None, None, None, :]
    values = tl.permute(tl.load(at + row * stride_token + (quarter + within)), (1, 0, 2, 3))
    even, odd = tl.split(tl.reshape(values, (TOKENS, SIZE // 2, 2)))
    return pairs_of(even, odd)


# -- embedding and rotation ------------------------------------------------------------------------


@triton.jit
def _embedded(first, second, cos_first, cos_second, sin_first, sin_second, dtype: tl.constexpr):
    """Return halves of heads after RoPE, rounded, as pairs. Products of numbers of 16 bits are exact in float32."""
    first_even, first_odd = even_of(first, dtype), odd_of(first, dtype)
    second_even, second_odd = even_of(second, dtype), odd_of(second, dtype)
    even = tl.fma(first_even, even_of(cos_first, dtype), negative(second_even * even_of(sin_first, dtype)))
    odd = tl.fma(first_odd, odd_of(cos_first, dtype), negative(second_odd * odd_of(sin_first, dtype)))
    other_even = tl.fma(second_even, even_of(cos_second, dtype), first_even * even_of(sin_second, dtype))
    other_odd = tl.fma(second_odd, odd_of(cos_second, dtype), first_odd * odd_of(sin_second, dtype))
    return rounded_pairs(even, odd, dtype), rounded_pairs(other_even, other_odd, dtype)


@triton.jit
def _operand(pairs, dtype: tl.constexpr):
    """Return pairs of rows as the left operand of a product, in the order in which threads have what it takes.

    A warp loads 8 rows and then 8 that are TOKENS / 2 later; of a product it has 16. A quarter of a row is spread over
    all eights of columns, as are the rows of ``head_matrices_by_thread``.
    """
    TOKENS: tl.constexpr = pairs.shape[0]
    PAIRS: tl.constexpr = pairs.shape[1]
    values = tl.join(pairs.to(tl.uint16).to(dtype, bitcast=True), (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True))
    values = tl.reshape(values, (2, TOKENS // 16, 8, THREADS, PAIRS // THREADS, 2))
    return tl.reshape(tl.permute(values, (1, 0, 2, 4, 3, 5)), (TOKENS, 2 * PAIRS))


@triton.jit
def _result(product, norm, dtype: tl.constexpr):
    """Return a product scaled and rounded, as pairs, rows and their elements in order again."""
    TOKENS: tl.constexpr = product.shape[0]
    SIZE: tl.constexpr = product.shape[1]
    even, odd = tl.split(tl.reshape(product, (TOKENS // 16, 2, 8, SIZE // (2 * THREADS), THREADS, 2)))
    pairs = tl.permute(rounded_pairs(even * norm, odd * norm, dtype), (1, 0, 2, 4, 3))
    return tl.reshape(pairs, (TOKENS, SIZE // 2))


# -- quantisation ----------------------------------------------------------------------------------


@triton.jit
def _encode(pairs, clip, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return a scale and a zero point of each row of pairs, in float32, and codes of its even and its odd elements.

    Codes are pairs [rows, words, codes of a word / 4] again, of one in a word's first half and one in its second.
    ``quarot::quantize_asymmetric`` defines the numbers, and these are the same, if products and sums are not contracted
    and scales are normal numbers below 2^77.
    """
    HIGHEST: tl.constexpr = 2.0**BITS - 1
    low, high = range_of_rows(pairs, dtype)
    low = tl.minimum(low, 0.0) * clip
    high = tl.maximum(high, 0.0, propagate_nan=tl.PropagateNan.ALL) * clip
    step = divide_scalars(high - low, HIGHEST)
    step = tl.where(step == 0, 1.0, step)
    highest = tl.where(step < float("inf"), HIGHEST, 0.0)  # a row with a value that is not finite has one code only
    zeros = tl.minimum(divide_scalars(-low, step) + ROUND_TO_INTEGER, ROUND_TO_INTEGER + highest)
    zeros = tl.maximum(zeros, ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    even = _codes(even_of(pairs, dtype), step, zeros, highest, WORD // BITS)
    odd = _codes(odd_of(pairs, dtype), step, zeros, highest, WORD // BITS)
    return step, zeros, even, odd


@triton.jit
def _codes(values, step, zeros, highest, CODES: tl.constexpr):
    """Return codes of every other element of rows, as pairs: see ``_encode``."""
    if INTERPRETED:  # its fma rounds twice
        quotients = values / step[:, None]
    else:
        # The reciprocal and what it lacks, to the second order: tests try all quotients that could be rounded wrongly.
        reciprocal = tl.minimum(divide_scalars(1.0, step), LARGEST)  # finite for any step
        missing = tl.fma(negative(reciprocal), step, 1.0)
        rest = (tl.fma(missing, missing, missing) * reciprocal)[:, None]
        quotients = tl.fma(values, tl.broadcast_to(reciprocal[:, None], values.shape), values * rest)
    integers = (quotients + ROUND_TO_INTEGER).to(tl.int32, bitcast=True)
    in_halves = tl.reshape(integers, (values.shape[0], 2 * values.shape[1] // CODES, 2, CODES // 4))
    first, second = tl.split(tl.permute(in_halves, (0, 1, 3, 2)))
    return added_and_clamped(last_halves(first, second), twice(zeros)[:, None, None], twice(highest)[:, None, None])


@triton.jit
def _decoded(codes, zeros, step):
    """Return the numbers that codes of every other element stand for, [rows, elements]."""
    both = tl.join(with_magic_number(codes, SECOND=False), with_magic_number(codes, SECOND=True))
    numbers = tl.reshape(tl.permute(both, (0, 1, 3, 2)), (codes.shape[0], 2 * codes.shape[1] * codes.shape[2]))
    return (numbers - (zeros + ROUND_TO_INTEGER)[:, None]) * step[:, None]


@triton.jit
def _store_of_groups(at, values, is_stored, GROUPS: tl.constexpr):
    """Store a number of each group of rows [TOKENS * GROUPS] at pointers to rows [TOKENS]."""
    TOKENS: tl.constexpr = at.shape[0]
    if GROUPS == 1:  # by the first of the threads that have a row: any other would have to get it from them
        thread = tl.arange(0, THREADS)[None, :]
        values = tl.broadcast_to(values[:, None], (TOKENS, THREADS))
        tl.store(at[:, None] + thread, values, mask=is_stored & (thread == 0))
    else:
        tl.store(at[:, None] + tl.arange(0, GROUPS)[None, :], tl.reshape(values, (TOKENS, GROUPS)), mask=is_stored)


# -- launch ----------------------------------------------------------------------------------------


def takes(new: Appended) -> bool:
    """Whether the kernel takes what is appended: not a few tokens, nor what would not be in pairs and words."""
    size, groups = new.x.shape[-1], new.scale.shape[-1]
    codes = WORD.value // new.bits  # of a word
    return (
        describe(new.x.device).has_pairs
        and new.x.dtype in DTYPES
        and all(angles is None or angles.dtype == new.x.dtype for angles in (new.cos, new.sin))
        and size in SIZES
        and new.x.shape[2] >= TOKENS
        and new.words.dtype == torch.int32
        and size // groups >= codes
        and new.clip >= SMALLEST_CLIP
    )


def heads_of_programs(parts: Sequence[Appended]) -> list[int]:
    """Return how many heads of each part a program takes: several with one matrix, if all programs have work then."""
    tiles = triton.cdiv(parts[0].x.shape[2], TOKENS)
    heads = tiles * sum(part.x.shape[0] * part.x.shape[1] for part in parts)
    fewest = PROGRAMS * describe(parts[0].x.device).multiprocessors

    def each(part: Appended) -> int:
        shared = (several for several in HEADS if heads // several >= fewest and part.x.shape[1] % several == 0)
        return 1 if part.balance is not None else next(shared, 1)

    return [each(part) for part in parts]


def launch(parts: Sequence[Appended]) -> None:
    """Append to one cache, or to two at the same positions."""
    device, tiles = describe(parts[0].x.device), triton.cdiv(parts[0].x.shape[2], TOKENS)
    each = heads_of_programs(parts)
    programs = [part.x.shape[0] * part.x.shape[1] // heads for part, heads in zip(parts, each, strict=True)]
    arguments = [part.arguments(head_matrices_by_thread) for part in parts]
    schemes = [_scheme(part, heads) for part, heads in zip(parts, each, strict=True)]
    _append_prompt[(tiles, sum(programs))](
        arguments[0], arguments[1] if len(parts) > 1 else None, programs[0],
        KEYS=schemes[0], VALUES=schemes[1] if len(parts) > 1 else None, TOKENS=TOKENS,
        EARLY=device.starts_early, launch_pdl=device.starts_early, num_warps=4, num_stages=1,
        enable_fp_fusion=False,  # a product is rounded before it is added to another, as in the reference
    )  # fmt: skip


def _scheme(new: Appended, heads: int) -> tuple[Any, ...]:
    """Return what a program of so many heads is compiled for."""
    return new.x.shape[-1], new.scale.shape[-1], new.bits, PRECISIONS[new.x.dtype], heads
