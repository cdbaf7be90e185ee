"""A Hadamard transform and quantisation of few long rows that have no slabs, each by several programs, as one is slow.

A row of A x B x C elements is rotated along A and C by a program for each index of B, and then along B, for which all
of these must be done, by a second kernel. Its programs all find the row's range, which is the same for every one, and
then each quantises a part. Nothing is added up but integers, so that a result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.activations import load_activated
from quarot_fx.lowering.triton.language import between_products, dot, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.quantization import quantization, rows_of_groups, store_codes
from quarot_fx.lowering.triton.rotate import load_matrix, rotated
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from

ELEMENTS_PER_WARP = 256  # of the first kernel, which is over before latencies could hide each other


@triton.jit
def _rotate_first_and_last(
    x,
    gate,
    left,
    right,
    between,
    sums,
    stride_x,
    stride_gate,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotate [A, C], what a row has at one index of B, and store it there in a row of B x A x C."""
    index, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a, c = tl.arange(0, BLOCK_A)[:, None], tl.arange(0, BLOCK_C)[None, :]
    mask = (a < A) & (c < C)
    place = (a * B + index) * C + c
    dtype: tl.constexpr = x.dtype.element_ty
    left_matrix = load_matrix(left, BLOCK_A)
    right_matrix = load_matrix(right, BLOCK_C)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    gate_at = None if gate is None else gate + row * stride_gate + place
    values = load_activated(x + row * stride_x + place, gate_at, mask, ACTIVATION)
    values = rotated(values, left_matrix, None, right_matrix, dtype, PRECISION, BLOCK_A, 1, BLOCK_C, IN_SLABS=False)
    values = between_products(tl.reshape(values, (BLOCK_A, BLOCK_C)), dtype)
    tl.store(between + (row * B + index) * (A * C) + a * C + c, values, mask=mask)
    if index == 0:
        tl.store(sums + row, 0)


@triton.jit
def _rotate_middle_and_quantize(
    between,
    middle,
    codes,
    scale,
    zero,
    sums,
    norm,
    clip,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_AC: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    BITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotate a row of B x A x C elements along B, and quantise PART of its A x C columns."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    AC: tl.constexpr = A * C
    SYMMETRIC: tl.constexpr = zero is None
    b = tl.arange(0, BLOCK_B)[:, None]
    column, own_column = tl.arange(0, BLOCK_AC)[None, :], part * PART + tl.arange(0, PART)[None, :]
    row_at = between + row * (B * AC) + b * AC
    own = (b < B) & (own_column < AC)
    group = row + tl.arange(0, 1)
    matrix = load_matrix(middle, BLOCK_B)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    own_values = tl.load(row_at + own_column, mask=own, other=0)
    values = tl.load(row_at + column, mask=(b < B) & (column < AC), other=0)
    values = dot(matrix.to(values.dtype), values, PRECISION)
    whole = rows_of_groups(tl.reshape(values, (1, BLOCK_B, BLOCK_AC)))
    step, zeros, lowest, highest = quantization(whole, norm, clip, SYMMETRIC, BITS)
    own_values = dot(matrix.to(own_values.dtype), own_values, PRECISION)
    codes_at = codes + row * (B * AC) + (own_column // C * B + b) * C + own_column % C
    size = B * tl.minimum(AC - part * PART, PART)
    own_values = tl.reshape(own_values, (1, BLOCK_B, PART))
    total = store_codes(own_values, norm, codes_at[None], own[None], step, zeros, lowest, highest, size, SYMMETRIC)
    tl.atomic_add(sums + group, total, sem="relaxed")
    if part == 0:
        tl.store(scale + group, step)
        if not SYMMETRIC:
            tl.store(zero + group, zeros.to(tl.int32))


def launch_parts(
    x: Tensor,
    gate: Tensor | None,
    strides: tuple[int, int],
    cut_matrices: tuple[Tensor | None, ...],
    operand: tuple[Tensor, Tensor, Tensor | None, Tensor],
    norm: float,
    clip: float,
    activation: str,
    bits: int,
    part: int,
    launch: dict[str, Any],
) -> None:
    """Fill an operand's codes, scale, zero point and sum, for rows that start the given numbers of elements apart.

    ``part`` of the columns of the second kernel are quantised by a program; ``launch`` says how the row is split.
    """
    codes, scale, zero, sums = operand
    left, middle, right = cut_matrices
    a, b, c = (launch[axis] for axis in "ABC")
    block_a, block_b, block_c = (launch[f"BLOCK_{axis}"] for axis in "ABC")
    rows = scale.numel()
    between = x.new_empty((rows, b, a, c), dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32)
    shared = {name: launch[name] for name in ("A", "B", "C", "PRECISION", "EARLY", "launch_pdl")}
    _rotate_first_and_last[(b, rows)](
        x, gate, left, right, between, sums, *strides,
        BLOCK_A=block_a, BLOCK_C=block_c, ACTIVATION=activation,
        num_warps=max(1, block_a * block_c // ELEMENTS_PER_WARP), **shared,
    )  # fmt: skip
    _rotate_middle_and_quantize[(triton.cdiv(a * c, part), rows)](
        between, middle, codes, scale, zero, sums, norm, clip,
        BLOCK_B=block_b, BLOCK_AC=power_of_two_from(a * c), PART=part, BITS=bits,
        num_warps=launch["num_warps"], **shared,
    )  # fmt: skip
