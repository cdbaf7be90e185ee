"""INT4 matrix-vector products, for one or two tokens: whole rows of the weight stream through registers.

No tensor core and no shared memory: a word of eight codes costs three instructions to unpack and two four-way dot
products a token. Few rows a program make many programs, which keeps enough bytes in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.language import (
    GATE_ROWS,
    activate,
    dot4,
    let_dependents_start,
    prefetch,
    wait_for_inputs,
)

WORDS_PER_LINE = tl.constexpr(32)  # of the cache
BLOCK_WORDS = tl.constexpr(32)  # of the weight's layout: 128 bytes


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
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0)  # the fastest, so that programs that share rows run together
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:  # a gate next to what it multiplies
        results = rows // 2
        rows = results // GATE_ROWS * (2 * GATE_ROWS) + rows % 2 * GATE_ROWS + results % GATE_ROWS
    row_at = tl.minimum(rows, N - 1)
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    lines = tl.minimum(tl.arange(0, BLOCK_K // WORDS_PER_LINE) * WORDS_PER_LINE, W_WORDS - 1)
    prefetch(w + row_at[:, None] * W_WORDS + lines[None, :], EARLY)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for start in range(0, W_WORDS, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        words = tl.load(w + row_at[:, None] * W_WORDS + columns[None, :], mask=(columns < W_WORDS)[None, :], other=0)
        low_at = columns // BLOCK_WORDS * (2 * BLOCK_WORDS) + columns % BLOCK_WORDS
        high_at = low_at + BLOCK_WORDS
        low_codes = tl.load(x + token * X_WORDS + low_at, mask=low_at < X_WORDS, other=0)
        high_codes = tl.load(x + token * X_WORDS + high_at, mask=high_at < X_WORDS, other=0)
        products = dot4(words & 0x0F0F0F0F, low_codes[None, :], products)
        products = dot4((words >> 4) & 0x0F0F0F0F, high_codes[None, :], products)
    product = tl.sum(products, axis=1)
    if w_zero is None:
        product -= 8 * tl.load(x_sum + token)
    else:
        product -= tl.load(x_sum + token) * tl.load(w_zero + row_at).to(tl.int32)
    if x_zero is not None:
        product -= tl.load(x_zero + token) * tl.load(w_sum + row_at)
    value = product.to(tl.float32) * (tl.load(w_scale + row_at) * tl.load(x_scale + token))
    if bias is not None:
        value += tl.load(bias + row_at).to(tl.float32)
    if ACTIVATION is not None:
        gate, up = tl.split(tl.reshape(value, (BLOCK_N // 2, 2)))
        value = activate(gate, ACTIVATION, y.dtype.element_ty) * up
        N = N // 2
        rows = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        row_at = tl.minimum(rows, N - 1)
    at = token * N + row_at
    if residual is not None:
        value += tl.load(residual + at).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=rows < N)
