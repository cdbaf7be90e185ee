"""An activation, a Hadamard transform and quantisation in one pass: a row stays in registers from load to store.

The transform is up to three products with small matrices on tensor cores (see ``rotation_matrices``). The first has
exact operands. What goes from one to the next is rounded to bfloat16 where the activation is, to tf32 where it is
float16, whose range could be too small, and not at all where it is float32.
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
from quarot_fx.lowering.triton.rows import rows_of
from quarot_fx.ops.quantize_activation import fake_operand
from quarot_fx.rotation import Rotation

PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


@triton.jit
def _between_products(values, dtype: tl.constexpr):
    """Return what one product gave in the type that the next one takes, for activations of this dtype."""
    values = values.to(tl.float32)
    return round_to(values, tl.bfloat16) if dtype == tl.bfloat16 else values


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
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take ROWS rows of A x B x C elements, one after the other."""
    ab, c = tl.arange(0, BLOCK_A * BLOCK_B), tl.arange(0, BLOCK_C)
    a, b = ab // BLOCK_B, ab % BLOCK_B
    in_row = ((a < A) & (b < B))[:, None] & (c < C)[None, :]
    place = ((a * B + b) * C)[:, None] + c[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    if left is not None:
        left_at = tl.arange(0, BLOCK_A)
        left_matrix = tl.load(left + left_at[:, None] * BLOCK_A + left_at[None, :])
    if middle is not None:
        middle_at = tl.arange(0, BLOCK_B)
        middle_matrix = tl.load(middle + middle_at[:, None] * BLOCK_B + middle_at[None, :])
    if right is not None:
        right_matrix = tl.load(right + c[:, None] * BLOCK_C + c[None, :])
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        group = tl.full((1,), row, tl.int32)
        is_row = group < rows  # a block, not a scalar: the interpreter would make the mask integers
        mask = in_row & is_row[:, None]
        values = tl.load(x + row.to(tl.int64) * stride_x + place, mask=mask, other=0)
        if gate is not None:
            gates = tl.load(gate + row.to(tl.int64) * stride_gate + place, mask=mask, other=0).to(tl.float32)
            values = round_to(activate(gates, ACTIVATION) * values.to(tl.float32), dtype)
        elif ACTIVATION != "identity":
            values = round_to(activate(values.to(tl.float32), ACTIVATION), dtype)
        if (gate is not None or ACTIVATION != "identity") and dtype != tl.float32:
            values = keep(values)
        if right is not None:
            values = dot(values, right_matrix, PRECISION)
        if left is not None:
            values = tl.reshape(_between_products(values, dtype), (BLOCK_A, BLOCK_B * BLOCK_C))
            values = dot(left_matrix.to(values.dtype), values, PRECISION)
        if middle is not None:
            values = tl.reshape(_between_products(values, dtype), (BLOCK_A, BLOCK_B, BLOCK_C))
            matrix = tl.broadcast_to(middle_matrix.to(values.dtype)[None, :, :], (BLOCK_A, BLOCK_B, BLOCK_B))
            values = dot(matrix, values, PRECISION)
        values = tl.reshape(values.to(tl.float32) * norm, (1, BLOCK_A * BLOCK_B, BLOCK_C))
        codes_at = (codes + row.to(tl.int64) * (A * B * C) + place)[None, :, :]
        store_quantized(values, codes_at, mask[None, :, :], scale, zero, sums, group, is_row, A * B * C, clip, BITS)


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
        rows, (a, b, c), blocks = x.numel() // size, cut.sizes, cut.blocks
        launch = dict(tiles.nearest("rotate_quantize", x.device, tokens=rows, elements=cut.elements))
        if cut.shared_bytes(x.dtype, launch["num_stages"]) > device.shared_bytes:
            launch["num_stages"] = 1
        x, stride_x = rows_of(x)
        gate, stride_gate = (None, 0) if gate is None else rows_of(gate)
        _rotate_quantize[(triton.cdiv(rows, launch["ROWS"]),)](
            x, gate, *matrices(cut, x.device, x.dtype),
            codes, scale, None if symmetric else zero, sums, rows, stride_x, stride_gate, cut.norm, clip,
            A=a, B=b, C=c, BLOCK_A=blocks[0], BLOCK_B=blocks[1], BLOCK_C=blocks[2],
            ACTIVATION=activation, PRECISION=PRECISIONS[x.dtype], BITS=bits,
            EARLY=device.starts_early, launch_pdl=device.starts_early, **launch,
        )  # fmt: skip
    return operand
