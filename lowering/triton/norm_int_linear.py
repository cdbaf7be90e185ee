"""RMSNorm, quantisation and matrix-vector product of one token in one kernel, whose programs quantise each for itself.

A kernel of its own for the norm would be mostly latency. Here it is hidden: weights are constant, so that a program has
whole rows of its weight on their way to registers before it waits for the token, and the next ones while it multiplies.
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
from quarot_fx.lowering.triton.int_gemv import BLOCK_WORDS, add_products, gated, rows_of_block
from quarot_fx.lowering.triton.language import as_float32, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import dot4
from quarot_fx.lowering.triton.quantization import packed_words, symmetric_step
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from

CODES = tl.constexpr(4)  # in a word of the token's, 8 bits each
MINUS_8 = tl.constexpr(-0x07070708)  # in each byte: what nibbles are too large by


@triton.jit
def _load_token(x, gain, words, SIZE: tl.constexpr):
    """Load numbers [words, 4] in float32; return what is quantised of them, and the sum of the squares of each word."""
    place = words[:, None] * CODES + tl.arange(0, CODES)[None, :]
    values = as_float32(tl.load(x + place, mask=place < SIZE, other=0))
    squares = tl.sum(values * values, axis=1)
    if gain is not None:
        values *= tl.load(gain + place, mask=place < SIZE, other=0).to(tl.float32)
    return values, squares


@triton.jit
def _load_rows(w, w_scale, rows, N, column, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """Load rows [BLOCK_N, columns] of the weight and their scales; of no row the last one."""
    if not EVEN:
        rows = tl.minimum(rows, N - 1)
    words_at = w + rows[:, None] * WORDS + column[None, :]
    if column.shape[0] == WORDS:
        words = tl.load(words_at)
    else:
        words = tl.load(words_at, mask=(column < WORDS)[None, :], other=0)
    return words, tl.load(w_scale + rows)


@triton.jit
def _norm_int_linear(
    x,
    gain,
    w,
    w_scale,
    bias,
    residual,
    y,
    N,
    eps,
    clip,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply BLOCKS blocks of BLOCK_N rows of WORDS words, which COLUMNS hold; EVEN if all programs have so many."""
    first = tl.program_id(0) * BLOCKS
    RATIO: tl.constexpr = 1 if ACTIVATION is None else 2
    N_RESULTS = N // RATIO
    column = tl.arange(0, COLUMNS)
    rows = rows_of_block(first, BLOCK_N, ACTIVATION)
    words, w_scales = _load_rows(w, w_scale, rows, N, column, WORDS, EVEN)
    low_words = column // BLOCK_WORDS * (2 * BLOCK_WORDS) + column % BLOCK_WORDS
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    low_values, low_squares = _load_token(x, gain, low_words, SIZE)
    high_values, high_squares = _load_token(x, gain, low_words + BLOCK_WORDS, SIZE)
    unit = tl.math.rsqrt(tl.sum(low_squares + high_squares) / SIZE + eps)  # NaN, if anything is: it shows in the scale
    magnitudes = tl.max(tl.maximum(tl.abs(low_values), tl.abs(high_values)), axis=1)
    step = symmetric_step(tl.max(magnitudes, axis=0), unit, clip, BITS)
    low_codes = packed_words(low_values, unit, step, BITS)
    high_codes = packed_words(high_values, unit, step, BITS)
    eights = tl.full((COLUMNS,), MINUS_8, tl.int32)
    origin = dot4(low_codes, eights, dot4(high_codes, eights, tl.zeros((COLUMNS,), tl.int32)))
    for index in range(BLOCKS):
        results = (first + index) * (BLOCK_N // RATIO) + tl.arange(0, BLOCK_N // RATIO)
        result_at = tl.minimum(results, N_RESULTS - 1)
        # What the epilogue needs is on its way before the product: later, nothing would be left to hide its latency.
        if bias is not None:
            biases = tl.load(bias + tl.minimum(rows_of_block(first + index, BLOCK_N, ACTIVATION), N - 1))
        if residual is not None:
            residuals = tl.load(residual + result_at)
        if BLOCKS > 1:
            following = rows_of_block(tl.minimum(first + index + 1, first + BLOCKS - 1), BLOCK_N, ACTIVATION)
            next_words, next_scales = _load_rows(w, w_scale, following, N, column, WORDS, EVEN)
        products = add_products(words, low_codes, high_codes, tl.broadcast_to(origin[None, :], (BLOCK_N, COLUMNS)))
        value = tl.sum(products, axis=1).to(tl.float32) * (w_scales.to(tl.float32) * step)
        if bias is not None:
            value += biases.to(tl.float32)
        if ACTIVATION is not None:
            value = gated(value, ACTIVATION, y.dtype.element_ty)
        if residual is not None:
            value += residuals.to(tl.float32)
        tl.store(y + result_at, value.to(y.dtype.element_ty), mask=results < N_RESULTS)
        if BLOCKS > 1:
            words, w_scales = next_words, next_scales


def norm_int_linear(
    x: Tensor,
    gain: Tensor | None,
    eps: float,
    bits: int,
    clip: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    activation: str | None,
    launch: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give.

    They are WORDS of the weight that a program multiplies at a time, and how many times it does: BLOCKS.
    """
    size, (rows, width) = x.shape[-1], weight.shape
    y = x.new_empty((*x.shape[:-1], rows if activation is None else rows // 2), dtype=dtype)
    if y.numel():
        launch = launch or tiles.nearest("norm_int_linear", x.device, rows=rows, columns=size)
        columns, early = power_of_two_from(width // 4), describe(x.device).starts_early
        block_n = max(launch["WORDS"] // columns, 1 if activation is None else 2)
        each = block_n * launch["BLOCKS"]
        gain, bias, residual = (None if one is None else one.contiguous() for one in (gain, bias, residual))
        _norm_int_linear[(triton.cdiv(rows, each),)](
            x.contiguous(), gain, weight.view(torch.int32), weight_scale.contiguous(), bias, residual, y,
            rows, eps, clip, SIZE=size, BITS=bits, WORDS=width // 4, COLUMNS=columns, ACTIVATION=activation,
            BLOCK_N=block_n, BLOCKS=launch["BLOCKS"], EVEN=rows % each == 0, num_warps=launch["num_warps"],
            EARLY=early, launch_pdl=early,
        )  # fmt: skip
    return y
