"""Matrix-vector products of integers, for one or two tokens: whole rows of the weight stream through registers.

No tensor core and no shared memory: a word of eight codes costs three instructions to unpack and two four-way dot
products a token, one of four codes of 8 bits one such product. A weight is constant, so that a program has its first
rows on their way before the kernels ahead are done, and later ones while it multiplies: DRAM is busy all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.activations import GATE_ROWS, activate
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import as_float32, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import dot4
from quarot_fx.lowering.triton.quantization import row_as_words
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from

BLOCK_WORDS = tl.constexpr(32)  # of the weight's layout: 128 bytes
CODES = tl.constexpr(4)  # of a word
MINUS_8 = tl.constexpr(-0x07070708)  # four bytes of -8


@triton.jit
def _words_that_meet(column, HALVES: tl.constexpr):
    """Return which words [columns, HALVES] of a row of codes meet a word of the weight, low nibbles and high ones."""
    half = tl.arange(0, HALVES)[None, :]
    return column[:, None] // BLOCK_WORDS * (HALVES * BLOCK_WORDS) + half * BLOCK_WORDS + column[:, None] % BLOCK_WORDS


@triton.jit
def _load_codes(x, word, X_WORDS: tl.constexpr):
    return tl.load(x + word, mask=word < X_WORDS, other=0)


@triton.jit
def _quantize(x, gain, word, eps, clip, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Return codes of a row as they are loaded, and their scale; it is normalised if there is an ``eps``."""
    place = word[:, None, :] * CODES + tl.arange(0, CODES)[None, :, None]
    values = as_float32(tl.load(x + place, mask=place < SIZE, other=0))
    unit = 1.0
    if eps is not None:
        unit = tl.math.rsqrt(tl.sum(values * values) / SIZE + eps)
    if gain is not None:
        values *= tl.load(gain + place, mask=place < SIZE, other=0).to(tl.float32)
    return row_as_words(values, unit, clip, BITS)


@triton.jit
def _rows_of(block, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return the rows of a block of the weight; a gate is next to what it multiplies."""
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:
        result = rows // 2
        rows = result // GATE_ROWS * (2 * GATE_ROWS) + rows % 2 * GATE_ROWS + result % GATE_ROWS
    return rows


@triton.jit
def _load_rows(w, w_scale, rows, N, column, W_WORDS: tl.constexpr):
    """Load rows of the weight [BLOCK_N, columns] and their scales."""
    row_at = tl.minimum(rows, N - 1)
    words = tl.load(w + row_at[:, None] * W_WORDS + column[None, :], mask=(column < W_WORDS)[None, :], other=0)
    return words, tl.load(w_scale + row_at)


@triton.jit
def _int_gemv(
    x,
    gain,
    x_scale,
    x_zero,
    x_sum,
    w,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    y,
    N,
    eps,
    clip,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    W_WORDS: tl.constexpr,
    W_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply BLOCKS times BLOCK_N rows of W_WORDS words, filled up to COLUMNS, by a token.

    x holds its codes, or without an ``x_scale`` what each program makes codes of BITS of for itself: a small part of
    the time that a kernel of its own would take.
    """
    token = tl.program_id(0)  # the fastest, so that programs that share rows run together
    first = tl.program_id(1) * BLOCKS
    RATIO: tl.constexpr = 1 if ACTIVATION is None else 2
    N_RESULTS = N // RATIO
    HALVES: tl.constexpr = 8 // W_BITS
    let_dependents_start(EARLY)
    column = tl.arange(0, COLUMNS)
    words, w_scales = _load_rows(w, w_scale, _rows_of(first, BLOCK_N, ACTIVATION), N, column, W_WORDS)
    wait_for_inputs(EARLY)
    word = _words_that_meet(column, HALVES)
    if x_scale is None:
        codes, x_scales = _quantize(x + token * SIZE, gain, word, eps, clip, SIZE, BITS)
    else:
        codes, x_scales = _load_codes(x + token * (SIZE // CODES), word, SIZE // CODES), tl.load(x_scale + token)
    if HALVES == 2:
        low_codes, high_codes = tl.split(codes)
    else:
        low_codes = tl.reshape(codes, (COLUMNS,))
    origin = tl.zeros((COLUMNS,), tl.int32)
    if W_BITS == 4 and w_zero is None:
        eight = tl.full((COLUMNS,), MINUS_8, tl.int32)
        origin = dot4(low_codes, eight, dot4(high_codes, eight, origin))
    for index in range(BLOCKS):
        rows = _rows_of(first + index, BLOCK_N, ACTIVATION)
        row_at = tl.minimum(rows, N - 1)
        results = (first + index) * (BLOCK_N // RATIO) + tl.arange(0, BLOCK_N // RATIO)
        at = token * N_RESULTS + tl.minimum(results, N_RESULTS - 1)
        # What the epilogue needs is on its way before the product: later, nothing would be left to hide its latency.
        if x_zero is not None:
            x_zeros, w_sums = tl.load(x_zero + token), tl.load(w_sum + row_at)
        if w_zero is not None:
            x_sums, w_zeros = tl.load(x_sum + token), tl.load(w_zero + row_at)
        if bias is not None:
            biases = tl.load(bias + row_at)
        if residual is not None:
            residuals = tl.load(residual + at)
        if BLOCKS > 1:
            following = tl.minimum(first + index + 1, first + BLOCKS - 1)
            next_words, next_scales = _load_rows(
                w, w_scale, _rows_of(following, BLOCK_N, ACTIVATION), N, column, W_WORDS
            )
        products = tl.broadcast_to(origin[None, :], (BLOCK_N, COLUMNS))
        if W_BITS == 4:
            products = dot4(words & 0x0F0F0F0F, low_codes[None, :], products)
            products = dot4((words >> 4) & 0x0F0F0F0F, high_codes[None, :], products)
        else:
            products = dot4(words, low_codes[None, :], products)
        product = tl.sum(products, axis=1)
        if w_zero is not None:
            product -= x_sums * w_zeros.to(tl.int32)
        if x_zero is not None:
            product -= x_zeros * w_sums
        value = product.to(tl.float32) * (w_scales * x_scales)
        if bias is not None:
            value += biases.to(tl.float32)
        if ACTIVATION is not None:
            gate, up = tl.split(tl.reshape(value, (BLOCK_N // 2, 2)))
            value = activate(gate, ACTIVATION, y.dtype.element_ty) * up
        if residual is not None:
            value += residuals.to(tl.float32)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=results < N_RESULTS)
        if BLOCKS > 1:
            words, w_scales = next_words, next_scales


def launch_gemv(
    x: Tensor,
    size: int,
    gain: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    x_sum: Tensor | None,
    weight: Tensor,
    weight_bits: int,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    activation: str | None,
    launch: Mapping[str, Any],
    eps: float | None = None,
    bits: int = 8,
    clip: float = 1.0,
) -> None:
    """Fill y, [tokens, results], of codes viewed as int32, or without ``x_scale`` of an activation of ``size`` elements
    that is normalised, if there is an ``eps``, and quantised to ``bits``. All tensors are contiguous.

    ``launch`` gives the WORDS of the weight that a program multiplies at a time, and how many times.
    """
    (rows, width), early = weight.shape, describe(weight.device).starts_early
    columns = power_of_two_from(width // 4)
    block_n = max(launch["WORDS"] // columns, 1 if activation is None else 2)
    tokens = y.numel() // (rows if activation is None else rows // 2)
    _int_gemv[(tokens, triton.cdiv(rows, block_n * launch["BLOCKS"]))](
        x, gain, x_scale, x_zero, x_sum, weight.view(torch.int32), weight_scale, weight_zero, weight_sum, bias, residual,
        y, rows, eps, clip, SIZE=size, BITS=bits, W_WORDS=width // 4, W_BITS=weight_bits, COLUMNS=columns,
        ACTIVATION=activation, BLOCK_N=block_n, BLOCKS=launch["BLOCKS"], num_warps=launch["num_warps"],
        EARLY=early, launch_pdl=early,
    )  # fmt: skip
