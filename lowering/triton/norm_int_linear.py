"""RMSNorm, quantisation and matrix-vector product of one token in one kernel, whose programs quantise each for itself.

A kernel of its own for the codes would be mostly latency. Here it is hidden: weights are constant, so that a program
has its rows of the weight on their way to registers before it waits for the token.
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
from quarot_fx.lowering.triton.int_gemv import BLOCK_WORDS, gated, rows_of_block
from quarot_fx.lowering.triton.language import INTERPRETED, as_float32, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import dot4
from quarot_fx.lowering.triton.quantization import packed_words, reaches_below, symmetric_step
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from

CODES = tl.constexpr(4)  # in a word of the token's, 8 bits each
LOW_NIBBLES, MINUS_EIGHTS = tl.constexpr(0x0F0F0F0F), tl.constexpr(-0x07070708)  # a number in each byte


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
def _sum_and_maximum(some, others):
    """Return the sum of some numbers and the maximum of others, found at once: warps wait for each other once."""
    if INTERPRETED:
        result = tl.sum(some, axis=0), tl.max(others, axis=0)
    else:
        result = tl.reduce((some, others), 0, _add_and_maximum)
    return result


@triton.jit
def _add_and_maximum(total, maximum, addend, other):
    return total + addend, tl.maximum(maximum, other)


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
    REACHES_BELOW: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply BLOCK_N rows of WORDS words, which COLUMNS hold."""
    RATIO: tl.constexpr = 1 if ACTIVATION is None else 2
    N_RESULTS = N // RATIO
    results = tl.program_id(0) * (BLOCK_N // RATIO) + tl.arange(0, BLOCK_N // RATIO)
    result_at = tl.minimum(results, N_RESULTS - 1)
    rows = tl.minimum(rows_of_block(tl.program_id(0), BLOCK_N, ACTIVATION), N - 1)
    column = tl.arange(0, COLUMNS)
    words = tl.load(w + rows[:, None] * WORDS + column[None, :], mask=(column < WORDS)[None, :], other=0)
    w_scales = tl.load(w_scale + rows)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    # What the epilogue needs is on its way before the product: later, nothing would be left to hide its latency behind.
    if bias is not None:
        biases = tl.load(bias + rows)
    if residual is not None:
        residuals = tl.load(residual + result_at)
    low_words = column // BLOCK_WORDS * (2 * BLOCK_WORDS) + column % BLOCK_WORDS
    low_values, low_squares = _load_token(x, gain, low_words, SIZE)
    high_values, high_squares = _load_token(x, gain, low_words + BLOCK_WORDS, SIZE)
    magnitudes = tl.max(tl.maximum(tl.abs(low_values), tl.abs(high_values)), axis=1)
    square, largest = _sum_and_maximum(low_squares + high_squares, magnitudes)
    unit = tl.math.rsqrt(square / SIZE + eps)  # NaN, if anything is: it shows in the scale
    step = symmetric_step(largest, unit, clip, BITS)
    low_codes = packed_words(low_values, unit, step, BITS, REACHES_BELOW)
    high_codes = packed_words(high_values, unit, step, BITS, REACHES_BELOW)
    low_codes, high_codes = low_codes[None, :], high_codes[None, :]
    # Nibbles are codes plus 8. That is taken off where sums begin, since what the token's codes add up to is not known.
    eights = tl.full((BLOCK_N, COLUMNS), MINUS_EIGHTS, tl.int32)
    products = dot4(eights, high_codes, dot4(eights, low_codes, tl.zeros_like(eights)))
    products = dot4(words & LOW_NIBBLES, low_codes, products)
    products = dot4((words >> 4) & LOW_NIBBLES, high_codes, products)
    value = tl.sum(products, axis=1).to(tl.float32) * (w_scales.to(tl.float32) * step)
    if bias is not None:
        value += biases.to(tl.float32)
    if ACTIVATION is not None:
        value = gated(value, ACTIVATION, y.dtype.element_ty)
    if residual is not None:
        value += residuals.to(tl.float32)
    tl.store(y + result_at, value.to(y.dtype.element_ty), mask=results < N_RESULTS)


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

    These say how many WORDS of the weight a program multiplies, in whole rows.
    """
    size, rows, words = x.shape[-1], len(weight), weight.shape[-1] // 4
    y = x.new_empty((*x.shape[:-1], rows if activation is None else rows // 2), dtype=dtype)
    if y.numel():
        launch = launch or tiles.nearest("norm_int_linear", x.device, rows=rows, columns=size)
        columns, early = power_of_two_from(words), describe(x.device).starts_early
        block_n = max(launch["WORDS"] // columns, 1 if activation is None else 2)
        gain, bias, residual = (None if one is None else one.contiguous() for one in (gain, bias, residual))
        _norm_int_linear[(triton.cdiv(rows, block_n),)](
            x.contiguous(), gain, weight.view(torch.int32), weight_scale.contiguous(), bias, residual, y,
            rows, eps, clip, SIZE=size, BITS=bits, REACHES_BELOW=reaches_below(bits, clip), WORDS=words,
            COLUMNS=columns, ACTIVATION=activation, BLOCK_N=block_n, EARLY=early,
            num_warps=launch["num_warps"], launch_pdl=early,
        )  # fmt: skip
    return y
