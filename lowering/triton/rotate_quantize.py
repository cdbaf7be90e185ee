"""A gated activation, a Hadamard transform and quantisation in one pass: a row stays in registers from load to store.

The transform is two products with small matrices on tensor cores (see ``rotation_matrices``). The first has exact
operands; what it gives is rounded to bfloat16 where the activation is, to tf32 where it is float16, whose range could
be too small, and not at all where it is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import (
    activate,
    dot,
    keep,
    let_dependents_start,
    round_to,
    store_quantized,
    wait_for_inputs,
)
from quarot_fx.lowering.triton.rotation_matrices import matrices, split
from quarot_fx.ops.quantize_activation import fake_operand
from quarot_fx.rotation import Rotation

PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


@triton.jit
def _rotate_quantize(
    x,
    gate,
    left,
    right,
    codes,
    scale,
    zero,
    sums,
    rows,
    norm,
    clip,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take ROWS rows of A x B elements, one after the other."""
    a, b = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    in_row = (a < A)[:, None] & (b < B)[None, :]
    if left is not None:
        left_matrix = tl.load(left + a[:, None] * BLOCK_A + a[None, :])
    if right is not None:
        right_matrix = tl.load(right + b[:, None] * BLOCK_B + b[None, :])
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        mask = in_row & (row < rows)
        at = row.to(tl.int64) * (A * B) + a[:, None] * B + b[None, :]
        values = tl.load(x + at, mask=mask, other=0)
        if gate is not None:
            gates = tl.load(gate + at, mask=mask, other=0).to(tl.float32)
            values = round_to(activate(gates, ACTIVATION) * values.to(tl.float32), values.dtype)
            if values.dtype != tl.float32:
                values = keep(values)
        if right is not None:
            values = dot(values, right_matrix, PRECISION)
        if left is not None:
            if left_matrix.dtype == tl.bfloat16:
                values = round_to(values.to(tl.float32), tl.bfloat16)
            else:
                values = values.to(tl.float32)
            values = dot(left_matrix, values, PRECISION)
        group = tl.full((1,), row, tl.int32)
        store_quantized(
            (values.to(tl.float32) * norm)[None, :, :],
            (codes + at)[None, :, :],
            mask[None, :, :],
            scale,
            zero,
            sums,
            group,
            group < rows,
            A * B,
            clip,
            BITS,
        )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the op declares, for one group a row."""
    operand = fake_operand(x, bits, group, clip, symmetric, container)
    codes, scale, zero, sums = operand
    if x.numel():
        size, device = x.shape[-1], describe(x.device)
        cut = split(Rotation.parse(rotation), size, inner)
        assert cut is not None, "the provider does not support this rotation"
        left_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        left, right = matrices(cut, x.device, left_dtype, x.dtype)
        rows, (block_a, block_b) = x.numel() // size, cut.blocks
        launch = dict(tiles.nearest("rotate_quantize", x.device, tokens=rows, elements=block_a * block_b))
        _rotate_quantize[(triton.cdiv(rows, launch["ROWS"]),)](
            x.contiguous(), None if gate is None else gate.contiguous(), left, right,
            codes, scale, None if symmetric else zero, sums, rows, cut.norm, clip,
            A=cut.a, B=cut.b, BLOCK_A=block_a, BLOCK_B=block_b, ACTIVATION=activation, PRECISION=PRECISIONS[x.dtype],
            BITS=bits, EARLY=device.starts_early, launch_pdl=device.starts_early, **launch,
        )  # fmt: skip
    return operand
