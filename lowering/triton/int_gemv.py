"""Matrix-vector products of integers, for one or two tokens: whole rows of the weight stream through registers.

No tensor core and no shared memory: a word of eight codes costs three instructions to unpack and two four-way dot
products a token, one of four codes of 8 bits one such product. Few rows a program make many programs, which keeps
enough bytes in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.activations import GATE_ROWS, activate
from quarot_fx.lowering.triton.language import let_dependents_start, prefetch, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import dot4

WORDS_PER_LINE = tl.constexpr(32)  # of the cache
BLOCK_WORDS = tl.constexpr(32)  # of the weight's layout: 128 bytes


@triton.jit
def rows_of_block(block, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return the rows of a block of the weight, a gate next to what it multiplies."""
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:
        result = rows // 2
        rows = result // GATE_ROWS * (2 * GATE_ROWS) + rows % 2 * GATE_ROWS + result % GATE_ROWS
    return rows


@triton.jit
def gated(value, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """Return activation(gate) * up of each pair of neighbours of a vector."""
    gate, up = tl.split(tl.reshape(value, (value.shape[0] // 2, 2)))
    return activate(gate, ACTIVATION, dtype) * up


@triton.jit
def _int_gemv(
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
    N,
    X_WORDS: tl.constexpr,
    W_WORDS: tl.constexpr,
    W_BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCHED: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0)  # the fastest, so that programs that share rows run together
    RATIO: tl.constexpr = 1 if ACTIVATION is None else 2
    N_RESULTS = N // RATIO
    results = tl.program_id(1) * (BLOCK_N // RATIO) + tl.arange(0, BLOCK_N // RATIO)
    row_at = tl.minimum(rows_of_block(tl.program_id(1), BLOCK_N, ACTIVATION), N - 1)
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    lines = tl.minimum(tl.arange(0, PREFETCHED // WORDS_PER_LINE) * WORDS_PER_LINE, W_WORDS - 1)
    prefetch(w + row_at[:, None] * W_WORDS + lines[None, :], EARLY)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    # What the epilogue needs is on its way before the product: later, nothing would be left to hide its latency behind.
    at = token * N_RESULTS + tl.minimum(results, N_RESULTS - 1)
    x_scales, x_sums, w_scales = tl.load(x_scale + token), tl.load(x_sum + token), tl.load(w_scale + row_at)
    if x_zero is not None:
        x_zeros, w_sums = tl.load(x_zero + token), tl.load(w_sum + row_at)
    if w_zero is not None:
        w_zeros = tl.load(w_zero + row_at)
    if bias is not None:
        biases = tl.load(bias + row_at)
    if residual is not None:
        residuals = tl.load(residual + at)
    for start in range(0, W_WORDS, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        words = tl.load(w + row_at[:, None] * W_WORDS + columns[None, :], mask=(columns < W_WORDS)[None, :], other=0)
        if W_BITS == 4:
            low_at = columns // BLOCK_WORDS * (2 * BLOCK_WORDS) + columns % BLOCK_WORDS
            high_at = low_at + BLOCK_WORDS
            low_codes = tl.load(x + token * X_WORDS + low_at, mask=low_at < X_WORDS, other=0)
            high_codes = tl.load(x + token * X_WORDS + high_at, mask=high_at < X_WORDS, other=0)
            products = dot4(words & 0x0F0F0F0F, low_codes[None, :], products)
            products = dot4((words >> 4) & 0x0F0F0F0F, high_codes[None, :], products)
        else:
            codes = tl.load(x + token * X_WORDS + columns, mask=columns < X_WORDS, other=0)
            products = dot4(words, codes[None, :], products)
    product = tl.sum(products, axis=1)
    if w_zero is not None:
        product -= x_sums * w_zeros.to(tl.int32)
    elif W_BITS == 4:
        product -= 8 * x_sums
    if x_zero is not None:
        product -= x_zeros * w_sums
    value = product.to(tl.float32) * (w_scales.to(tl.float32) * x_scales)
    if bias is not None:
        value += biases.to(tl.float32)
    if ACTIVATION is not None:
        value = gated(value, ACTIVATION, y.dtype.element_ty)
    if residual is not None:
        value += residuals.to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=results < N_RESULTS)
