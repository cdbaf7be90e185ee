"""Hadamard across heads, quantisation and matrix-vector product of one token in one kernel.

Its programs rotate and quantise all of the token, each for itself: across heads that is one product with a matrix as
small as there are heads. ``token_product`` says why, and multiplies.
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
from quarot_fx.lowering.triton.language import dot, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.quantization import largest_magnitude, packed_words, symmetric_step
from quarot_fx.lowering.triton.rotate import PRECISIONS, load_matrix
from quarot_fx.lowering.triton.rotation_matrices import matrices, split
from quarot_fx.lowering.triton.token_product import CODES, launch_constants, load_rows, multiply_rows
from quarot_fx.rotation import Rotation


@triton.jit
def _rotate_int_linear(
    x,
    matrix,
    w,
    w_scale,
    bias,
    residual,
    y,
    N,
    norm,
    clip,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply BLOCKS blocks of BLOCK_N rows of WORDS words, which COLUMNS hold; EVEN if all programs have so many."""
    first = tl.program_id(0) * BLOCKS
    words, w_scales = load_rows(
        w, w_scale, rows_of_block(first, BLOCK_N, None), N, tl.arange(0, COLUMNS), WORDS, EVEN
    )  # fmt: skip
    rotation = load_matrix(matrix, BLOCK_HEADS)
    head, element = tl.arange(0, BLOCK_HEADS), tl.arange(0, HEAD)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    values = tl.load(x + head[:, None] * HEAD + element[None, :], mask=(head < HEADS)[:, None], other=0)
    values = dot(rotation, values, PRECISION)
    largest = tl.sum(largest_magnitude(tl.reshape(values, (1, BLOCK_HEADS * HEAD))), axis=0)
    # If anything is not finite, every result is NaN.
    step = tl.where(largest < float("inf"), symmetric_step(largest, norm, clip, BITS), float("nan"))
    codes = packed_words(tl.reshape(values, (BLOCK_HEADS * HEAD // CODES, CODES)), norm, step, BITS)
    pairs = tl.permute(tl.reshape(codes, (COLUMNS // BLOCK_WORDS, 2, BLOCK_WORDS)), (0, 2, 1))
    low_codes, high_codes = tl.split(pairs)
    multiply_rows(
        words, w_scales, tl.reshape(low_codes, (COLUMNS,)), tl.reshape(high_codes, (COLUMNS,)), step,
        w, w_scale, bias, residual, y, first, N, WORDS, COLUMNS, None, BLOCK_N, BLOCKS, EVEN,
    )  # fmt: skip


def rotate_int_linear(
    x: Tensor,
    rotation: str,
    inner: int,
    bits: int,
    clip: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    launch: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    size, rows = x.shape[-1], len(weight)
    y = x.new_empty((*x.shape[:-1], rows), dtype=dtype)
    if y.numel():
        cut = split(Rotation.parse(rotation), size, inner, x.dtype)
        assert cut is not None, "the provider does not support this rotation"
        heads, _, head = cut.sizes
        launch = launch or tiles.nearest("rotate_int_linear", x.device, rows=rows, columns=size)
        programs, constants = launch_constants(weight, cut.elements // (2 * CODES.value), None, launch)
        bias, residual = (None if one is None else one.contiguous() for one in (bias, residual))
        _rotate_int_linear[(programs,)](
            x.contiguous(), matrices(cut, x.device, x.dtype)[0], weight.view(torch.int32), weight_scale.contiguous(),
            bias, residual, y, rows, cut.norm, clip, HEADS=heads, HEAD=head, BLOCK_HEADS=cut.blocks[0],
            PRECISION=PRECISIONS[x.dtype], BITS=bits, **constants,
        )  # fmt: skip
    return y
