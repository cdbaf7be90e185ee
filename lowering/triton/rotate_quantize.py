"""An activation, a Hadamard transform and quantisation in one pass: a row stays in registers from load to store.

``rotate`` says how the transform is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.activations import load_activated
from quarot_fx.lowering.triton.language import let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.quantization import store_quantized
from quarot_fx.lowering.triton.rotate import launch_parameters, load_matrix, places, rotated
from quarot_fx.lowering.triton.rotate_quantize_parts import launch_parts
from quarot_fx.lowering.triton.rotate_quantize_shared import launch_shared, takes
from quarot_fx.lowering.triton.rotate_slabs import SIDE
from quarot_fx.lowering.triton.rotation_matrices import matrices, split
from quarot_fx.lowering.triton.rows import rows_of
from quarot_fx.lowering.triton.stacked_slabs import stacked
from quarot_fx.ops.quantize_activation import fake_operand
from quarot_fx.rotation import Rotation


@triton.jit
def _rotate_quantize(
    x,
    gate,
    left,
    middle,
    right,
    codes,
    scale,
    zero,
    sums,
    rows,
    stride_x,
    stride_gate,
    norm,
    clip,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_SLABS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take ROWS rows of A x B x C elements, one after the other."""
    in_row, place = places(A, B, C, BLOCK_A, BLOCK_B, BLOCK_C, IN_SLABS)
    is_result, result_place = places(A, B, C, BLOCK_A, BLOCK_B, BLOCK_C, IN_SLABS=False)
    dtype: tl.constexpr = x.dtype.element_ty
    left_matrix = load_matrix(left, BLOCK_A)
    middle_matrix = load_matrix(middle, SIDE if IN_SLABS else BLOCK_B)
    right_matrix = load_matrix(right, SIDE if IN_SLABS else BLOCK_C)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        group = tl.full((1,), row, tl.int32)
        is_row = group < rows  # a block, not a scalar: the interpreter would make the mask integers
        gate_at = None if gate is None else gate + row.to(tl.int64) * stride_gate + place
        values = load_activated(x + row.to(tl.int64) * stride_x + place, gate_at, in_row & is_row[:, None], ACTIVATION)
        values = rotated(
            values, left_matrix, middle_matrix, right_matrix, dtype, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C, IN_SLABS
        )
        values = tl.reshape(values.to(tl.float32), (1, BLOCK_A * BLOCK_B, BLOCK_C))
        codes_at = (codes + row.to(tl.int64) * (A * B * C) + result_place)[None, :, :]
        mask = (is_result & is_row[:, None])[None, :, :]
        store_quantized(values, norm, codes_at, mask, scale, zero, sums, group, is_row, A * B * C, clip, BITS)


def rotate_quantize(
    x: Tensor,
    gate: Tensor | None,
    activation: str,
    rotation: str,
    inner: int,
    bits: int,
    group: int | None,
    clip: float,
    symmetric: bool,
    container: torch.dtype,
    launch: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the op declares, for one group a row; ``launch`` replaces the launch parameters that tables give."""
    operand = fake_operand(x, bits, group, clip, symmetric, container)
    codes, scale, zero, sums = operand
    if x.numel() == 0:
        return operand
    size = x.shape[-1]
    cut = split(Rotation.parse(rotation), size, inner, x.dtype)
    assert cut is not None, "the provider does not support this rotation"
    rows, slabs = x.numel() // size, stacked(cut)
    is_shared = launch is None and takes(x, gate, bits, container, clip, slabs)
    x, stride_x = rows_of(x)
    gate, stride_gate = (None, 0) if gate is None else rows_of(gate)
    filled = codes, scale, None if symmetric else zero, sums
    if is_shared:
        launch_shared(x, gate, (stride_x, stride_gate), filled, slabs, clip, activation, bits)
        return operand
    parameters = launch_parameters(cut, x, rows, launch)
    part, factors = parameters.pop("PART", None), matrices(cut, x.device, x.dtype)
    if part and cut.has_parts:
        strides = stride_x, stride_gate
        launch_parts(x, gate, strides, factors, filled, cut.norm, clip, activation, bits, part, parameters)
    else:
        _rotate_quantize[(triton.cdiv(rows, parameters["ROWS"]),)](
            x, gate, *factors, *filled, rows, stride_x, stride_gate, cut.norm, clip,
            ACTIVATION=activation, BITS=bits, **parameters,
        )  # fmt: skip
    return operand
