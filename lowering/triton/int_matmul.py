"""INT4 and INT8 matrix products on tensor cores: tiles of ``W X^T`` for any number of tokens, with split-K for few.

The weight is the left operand, because only the left one may come from registers, where it is unpacked; tokens are
columns. Two codes a byte become int8 (times 16), or, where activations are coded as float8_e4m3, the subnormal numbers
u 2^-9 of the same bit pattern: e4m3 is linear from 0 to 15, so that unpacking is a mask. Hopper's fp8 accumulators keep
14 bits, which sums of 128 products of 4-bit codes fit; then they are added up in float32, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.epilogue import finished, group_scales
from quarot_fx.lowering.triton.language import let_dependents_start, prefetch, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import high_codes_times_16, high_nibbles, low_codes_times_16, low_nibbles

PREFETCH_LINES = tl.constexpr(8)  # of each row of a tile, 128 bytes each
BLOCK_BYTES = tl.constexpr(128)  # of the weight's layout: see quarot_fx.ops.pack_weight
EXACT_CODES = tl.constexpr(128)  # products of 4-bit codes, 15 * 8 at most, whose sum fits 14 bits


@triton.jit
def _load_weight(w, row, column, rows, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Load [BLOCK_N, BLOCK_K] of a row-major matrix of this width in bytes."""
    if TMA:
        tile = w.load([row, column])
    else:
        columns = column + tl.arange(0, BLOCK_K)
        tile = tl.load(w + rows[:, None] * WIDTH + columns[None, :], mask=(columns < WIDTH)[None, :], other=0)
    return tile


@triton.jit
def _load_codes(x, token, k, tokens, M, BLOCK_K: tl.constexpr, SIZE: tl.constexpr, TMA: tl.constexpr):
    """Load [BLOCK_K, BLOCK_M] of the codes, transposed; beyond SIZE and M there are zeros, which cost no traffic."""
    if TMA:
        tile = x.load([token, k]).T
    else:
        ks = k + tl.arange(0, BLOCK_K)
        tile = tl.load(
            x + tokens[None, :] * SIZE + ks[:, None], mask=(ks < SIZE)[:, None] & (tokens < M)[None, :], other=0.0
        )
    return tile


@triton.jit
def _multiply(weight, codes, accumulator, IS_FLOAT: tl.constexpr):
    if IS_FLOAT:
        product = tl.dot(weight.to(tl.float8e4nv, bitcast=True), codes, accumulator)
    else:
        product = tl.dot(weight, codes, accumulator, out_dtype=tl.int32)
    return product


@triton.jit
def _finish(
    product,
    token,
    row,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    y,
    M,
    N,
    SIZE: tl.constexpr,
    IMPLIED_ZERO: tl.constexpr,
    SUBTRACTED: tl.constexpr,
    UNIT: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    """Store what a product [BLOCK_N, BLOCK_M] becomes, transposed."""
    tokens, rows = token + tl.arange(0, product.shape[1]), row + tl.arange(0, product.shape[0])
    dtype: tl.constexpr = y.dtype if TMA_STORE else y.dtype.element_ty
    value = finished(
        product,
        tokens,
        rows,
        x_scale,
        x_zero,
        x_sum,
        w_scale,
        w_zero,
        w_sum,
        bias,
        residual,
        M,
        N,
        dtype,
        SIZE,
        IMPLIED_ZERO,
        SUBTRACTED,
        UNIT,
        X_GROUP,
        W_GROUP,
        ACTIVATION,
    )
    if ACTIVATION is not None:
        row, N = row // 2, N // 2
        rows = row + tl.arange(0, value.shape[0])
    if TMA_STORE:
        y.store([token, row], value.T.to(dtype))
    else:
        at = tokens.to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(y + at, value.to(dtype), mask=(tokens < M)[None, :] & (rows < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def _int_matmul(
    x,
    w,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    y,
    partial,
    M,
    N,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    W_BITS: tl.constexpr,
    IMPLIED_ZERO: tl.constexpr,
    SUBTRACTED: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RASTER: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    EARLY: tl.constexpr,
):
    # Tiles that run at the same time share tokens and rows: RASTER token tiles for every row tile in turn.
    token_tiles, row_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (RASTER * row_tiles) * RASTER
    height = tl.minimum(token_tiles - first, RASTER)
    within = tile % (RASTER * row_tiles)
    token, row = (first + within % height) * BLOCK_M, within // height * BLOCK_N
    tokens, rows = token + tl.arange(0, BLOCK_M), row + tl.arange(0, BLOCK_N)
    # A tile that overhangs reads the last row again, which costs no mask, and stores it once.
    token_at, row_at = tl.minimum(tokens, M - 1), tl.minimum(rows, N - 1)

    GROUPED: tl.constexpr = X_GROUP != 0 or W_GROUP != 0
    # What may be added up on the tensor cores over all of K: exact, and of one scale.
    WHOLE: tl.constexpr = not GROUPED and not IS_FLOAT
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
    PART: tl.constexpr = tl.float32 if IS_FLOAT else tl.int32

    STEPS_PER_BLOCK: tl.constexpr = BLOCK_BYTES // BLOCK_K
    # Steps beyond the weight's width, which a split may have, read zeros.
    STEPS: tl.constexpr = ((WIDTH + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K
    if not TMA:
        lines = tl.program_id(1) * STEPS * BLOCK_K + tl.arange(0, PREFETCH_LINES) * 128
        prefetch(w + row_at[:, None] * WIDTH + tl.minimum(lines, WIDTH - 1)[None, :], EARLY)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for index in range(STEPS):
        step = tl.program_id(1) * STEPS + index
        column = step * BLOCK_K
        packed = _load_weight(w, row, column, row_at, BLOCK_K, WIDTH, TMA)
        if W_BITS == 8:
            codes = _load_codes(x, token, column, tokens, M, BLOCK_K, SIZE, TMA)
            if WHOLE:
                accumulator = _multiply(packed, codes, accumulator, IS_FLOAT)
            else:
                part = _multiply(packed, codes, tl.zeros((BLOCK_N, BLOCK_M), PART), IS_FLOAT)
                scale = group_scales(x_scale, w_scale, token_at, row_at, column, SIZE, X_GROUP, W_GROUP)
                accumulator += part.to(tl.float32) * scale
        else:
            k = step // STEPS_PER_BLOCK * (2 * BLOCK_BYTES) + step % STEPS_PER_BLOCK * BLOCK_K
            low_codes = _load_codes(x, token, k, tokens, M, BLOCK_K, SIZE, TMA)
            high_codes = _load_codes(x, token, k + BLOCK_BYTES, tokens, M, BLOCK_K, SIZE, TMA)
            low = low_nibbles(packed) if IS_FLOAT else low_codes_times_16(packed)
            high = high_nibbles(packed) if IS_FLOAT else high_codes_times_16(packed)
            if WHOLE:
                accumulator = _multiply(low, low_codes, accumulator, IS_FLOAT)
                accumulator = _multiply(high, high_codes, accumulator, IS_FLOAT)
            else:
                part = _multiply(low, low_codes, tl.zeros((BLOCK_N, BLOCK_M), PART), IS_FLOAT)
                if GROUPED:
                    scale = group_scales(x_scale, w_scale, token_at, row_at, k, SIZE, X_GROUP, W_GROUP)
                    accumulator += part.to(tl.float32) * scale
                elif 2 * BLOCK_K > EXACT_CODES:
                    accumulator += part
                if GROUPED or 2 * BLOCK_K > EXACT_CODES:
                    part = tl.zeros((BLOCK_N, BLOCK_M), PART)
                part = _multiply(high, high_codes, part, IS_FLOAT)
                if GROUPED:
                    at = k + BLOCK_BYTES
                    scale = group_scales(x_scale, w_scale, token_at, row_at, at, SIZE, X_GROUP, W_GROUP)
                    accumulator += part.to(tl.float32) * scale
                else:
                    accumulator += part
    # Unpacked codes were multiplied by a power of two. It is taken back, exactly, by the scale if nothing comes before.
    HAS_ZEROS: tl.constexpr = IMPLIED_ZERO != SUBTRACTED or w_zero is not None or x_zero is not None
    UNIT: tl.constexpr = 16 if W_BITS == 4 and WHOLE and SPLIT_K == 1 and not HAS_ZEROS else 1
    if W_BITS == 4 and IS_FLOAT:
        accumulator *= 512.0
    elif W_BITS == 4 and UNIT == 1:
        accumulator = accumulator >> 4 if WHOLE else accumulator * (1.0 / 16)
    if SPLIT_K == 1:
        _finish(
            accumulator,
            token,
            row,
            x_scale,
            x_zero,
            x_sum,
            w_scale,
            w_zero,
            w_sum,
            bias,
            residual,
            y,
            M,
            N,
            SIZE,
            IMPLIED_ZERO,
            SUBTRACTED,
            UNIT,
            X_GROUP,
            W_GROUP,
            ACTIVATION,
            TMA_STORE,
        )
    else:
        at = (tl.program_id(1) * M + tokens[None, :]).to(tl.int64) * N + rows[:, None]
        tl.store(partial + at, accumulator, mask=(tokens < M)[None, :] & (rows < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    partial,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    y,
    M,
    N,
    SIZE: tl.constexpr,
    IMPLIED_ZERO: tl.constexpr,
    SUBTRACTED: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the parts of a split product in a fixed order, and finish it."""
    row, token = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    rows, tokens = row + tl.arange(0, BLOCK_N), token + tl.arange(0, BLOCK_M)
    mask = (tokens < M)[None, :] & (rows < N)[:, None]
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    product = tl.zeros((BLOCK_N, BLOCK_M), partial.dtype.element_ty)
    for part in tl.static_range(SPLIT_K):
        at = (part * M + tokens[None, :]).to(tl.int64) * N + rows[:, None]
        product += tl.load(partial + at, mask=mask, other=0)
    _finish(
        product,
        token,
        row,
        x_scale,
        x_zero,
        x_sum,
        w_scale,
        w_zero,
        w_sum,
        bias,
        residual,
        y,
        M,
        N,
        SIZE,
        IMPLIED_ZERO,
        SUBTRACTED,
        1,
        X_GROUP,
        W_GROUP,
        ACTIVATION,
        TMA_STORE=False,
    )
