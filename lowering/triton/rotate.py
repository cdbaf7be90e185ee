"""A Hadamard transform along rows: products with small matrices on tensor cores (``rotation_matrices``).

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
from quarot_fx.lowering.triton.language import between_products, dot, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotate_slabs import SIDE, slab_places, slabs_rotated
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
    IN_SLABS: tl.constexpr,
):
    """Return which elements there are of a row of A x B x C, as slabs or [BLOCK_A * BLOCK_B, BLOCK_C], and where."""
    if IN_SLABS:
        in_row, place = slab_places(A * C, BLOCK_A * BLOCK_C)
    else:
        ab, c = tl.arange(0, BLOCK_A * BLOCK_B), tl.arange(0, BLOCK_C)
        a, b = ab // BLOCK_B, ab % BLOCK_B
        in_row = ((a < A) & (b < B))[:, None] & (c < C)[None, :]
        place = ((a * B + b) * C)[:, None] + c[None, :]
    return in_row, place


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
    IN_SLABS: tl.constexpr,
):
    """Return a row, given as slabs or as [A * B, C], times the matrices that there are: unscaled, in any shape."""
    if IN_SLABS:
        values = slabs_rotated(values, right, middle, dtype, PRECISION)
    elif right is not None:
        values = dot(values, right, PRECISION)
    if left is not None:
        values = tl.reshape(between_products(values, dtype), (A, B * C))
        values = dot(left.to(values.dtype), values, PRECISION)
    if middle is not None and not IN_SLABS:
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
    IN_SLABS: tl.constexpr,
    PRECISION: tl.constexpr,
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
        is_row = tl.full((1, 1), row, tl.int32) < rows
        start = row.to(tl.int64) * (A * B * C)
        values = tl.load(x + start + place, mask=in_row & is_row, other=0)
        values = rotated(
            values, left_matrix, middle_matrix, right_matrix, dtype, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C, IN_SLABS
        )
        values = tl.reshape(values.to(tl.float32) * norm, result_place.shape)
        tl.store(y + start + result_place, round_to(values, dtype), mask=is_result & is_row)


def launch_parameters(cut: Split, x: Tensor, rows: int, launch: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the constants of a kernel that rotates so many rows of x by a split; tables give the ``launch``."""
    device = describe(x.device)
    launch = dict(launch or tiles.nearest("rotate_quantize", x.device, tokens=rows, elements=cut.elements))
    if cut.shared_bytes(x.dtype, launch["num_stages"]) > device.shared_bytes:
        launch["num_stages"] = 1
    sizes = zip("ABC", cut.sizes, cut.blocks, strict=True)
    shape = {name: value for axis, size, block in sizes for name, value in ((axis, size), (f"BLOCK_{axis}", block))}
    shape["IN_SLABS"], early = cut.in_slabs, device.starts_early
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
