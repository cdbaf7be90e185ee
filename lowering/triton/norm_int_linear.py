"""RMSNorm, quantisation and matrix-vector product of one token in one kernel, whose programs quantise each for itself.

``token_product`` says why, and multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.int_gemv import BLOCK_WORDS, rows_of_block
from quarot_fx.lowering.triton.language import INTERPRETED, as_float32, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.quantization import packed_words, symmetric_step
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from
from quarot_fx.lowering.triton.token_product import CODES, launch_constants, load_rows, multiply_rows


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
    column = tl.arange(0, COLUMNS)
    rows = rows_of_block(first, BLOCK_N, ACTIVATION)
    words, w_scales = load_rows(w, w_scale, rows, N, column, WORDS, EVEN)
    low_words = column // BLOCK_WORDS * (2 * BLOCK_WORDS) + column % BLOCK_WORDS
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    low_values, low_squares = _load_token(x, gain, low_words, SIZE)
    high_values, high_squares = _load_token(x, gain, low_words + BLOCK_WORDS, SIZE)
    magnitudes = tl.max(tl.maximum(tl.abs(low_values), tl.abs(high_values)), axis=1)
    square, largest = _sum_and_maximum(low_squares + high_squares, magnitudes)
    unit = tl.math.rsqrt(square / SIZE + eps)  # NaN, if anything is: it shows in the scale
    step = symmetric_step(largest, unit, clip, BITS)
    low_codes = packed_words(low_values, unit, step, BITS)
    high_codes = packed_words(high_values, unit, step, BITS)
    multiply_rows(
        words, w_scales, low_codes, high_codes, step, w, w_scale, bias, residual, y,
        first, N, WORDS, COLUMNS, ACTIVATION, BLOCK_N, BLOCKS, EVEN,
    )  # fmt: skip


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
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    size, rows = x.shape[-1], len(weight)
    y = x.new_empty((*x.shape[:-1], rows if activation is None else rows // 2), dtype=dtype)
    if y.numel():
        launch = launch or tiles.nearest("norm_int_linear", x.device, rows=rows, columns=size)
        columns = power_of_two_from(weight.shape[-1] // 4)
        programs, constants = launch_constants(weight, columns, activation, launch)
        gain, bias, residual = (None if one is None else one.contiguous() for one in (gain, bias, residual))
        _norm_int_linear[(programs,)](
            x.contiguous(), gain, weight.view(torch.int32), weight_scale.contiguous(), bias, residual, y,
            rows, eps, clip, SIZE=size, BITS=bits, ACTIVATION=activation, **constants,
        )  # fmt: skip
    return y
