"""A Hadamard transform along rows: up to three products with small matrices on tensor cores (``rotation_matrices``).

The first has exact operands. What goes from one to the next is rounded to bfloat16 where the activation is, to tf32
where it is float16, whose range could be too small, and not at all where it is float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotation_matrices import Split, matrices, split_of

PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


@triton.jit
def load_matrix(matrix, BLOCK: tl.constexpr):
    """Return a matrix [BLOCK, BLOCK], or nothing of nothing."""
    if matrix is None:
        loaded = None
    else:
        at = tl.arange(0, BLOCK)
        loaded = tl.load(matrix + at[:, None] * BLOCK + at[None, :])
    return loaded


@triton.jit
def places(
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return where the elements of a row of A x B x C are, as [BLOCK_A * BLOCK_B, BLOCK_C], and which there are."""
    ab, c = tl.arange(0, BLOCK_A * BLOCK_B), tl.arange(0, BLOCK_C)
    a, b = ab // BLOCK_B, ab % BLOCK_B
    in_row = ((a < A) & (b < B))[:, None] & (c < C)[None, :]
    return in_row, ((a * B + b) * C)[:, None] + c[None, :]


@triton.jit
def between_products(values, dtype: tl.constexpr):
    """Return what one product gave in the type that the next one takes, for activations of this dtype."""
    values = values.to(tl.float32)
    return round_to(values, tl.bfloat16) if dtype == tl.bfloat16 else values


@triton.jit
def rotated(
    values,
    left,
    middle,
    right,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """Return a row, given as [A * B, C], times the matrices that there are: unscaled, in any shape."""
    if right is not None:
        values = dot(values, right, PRECISION)
    if left is not None:
        values = tl.reshape(between_products(values, dtype), (A, B * C))
        values = dot(left.to(values.dtype), values, PRECISION)
    if middle is not None:
        values = tl.reshape(between_products(values, dtype), (A, B, C))
        matrix = tl.broadcast_to(middle.to(values.dtype)[None, :, :], (A, B, B))
        values = dot(matrix, values, PRECISION)
    return values


@triton.jit
def _rotate(
    x,
    left,
    middle,
    right,
    y,
    rows,
    norm,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take ROWS rows of A x B x C elements, one after the other."""
    in_row, place = places(A, B, C, BLOCK_A, BLOCK_B, BLOCK_C)
    dtype: tl.constexpr = x.dtype.element_ty
    left_matrix = load_matrix(left, BLOCK_A)
    middle_matrix = load_matrix(middle, BLOCK_B)
    right_matrix = load_matrix(right, BLOCK_C)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        mask = in_row & (tl.full((1, 1), row, tl.int32) < rows)
        at = row.to(tl.int64) * (A * B * C) + place
        values = tl.load(x + at, mask=mask, other=0)
        values = rotated(values, left_matrix, middle_matrix, right_matrix, dtype, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C)
        values = tl.reshape(values.to(tl.float32) * norm, (BLOCK_A * BLOCK_B, BLOCK_C))
        tl.store(y + at, round_to(values, dtype), mask=mask)


def launch_parameters(cut: Split, x: Tensor, rows: int, launch: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the constants of a kernel that rotates so many rows of x by a split; tables give the ``launch``."""
    device = describe(x.device)
    launch = dict(launch or tiles.nearest("rotate_quantize", x.device, tokens=rows, elements=cut.elements))
    if cut.shared_bytes(x.dtype, launch["num_stages"]) > device.shared_bytes:
        launch["num_stages"] = 1
    sizes = zip("ABC", cut.sizes, cut.blocks, strict=True)
    shape = {name: value for axis, size, block in sizes for name, value in ((axis, size), (f"BLOCK_{axis}", block))}
    early = device.starts_early
    return {**shape, "PRECISION": PRECISIONS[x.dtype], "EARLY": early, "launch_pdl": early, **launch}


def rotate(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> Tensor:
    """Return what the op declares, for the last axis."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        cut = split_of(x, rotation, inner)
        assert cut is not None, "the provider does not support this rotation"
        rows = x.numel() // math.prod(cut.sizes)
        launch = launch_parameters(cut, x, rows)
        launch.pop("PART", None)  # several programs a row are worth it only where its range is looked for, too
        grid = (triton.cdiv(rows, launch["ROWS"]),)
        _rotate[grid](x, *matrices(cut, x.device, x.dtype, inverse), y, rows, cut.norm, **launch)
    return y
