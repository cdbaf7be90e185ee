"""Slabs of 256 elements of a row, each rotated by one warp in its registers, by two products with matrices of 16 rows.

Thread 4g + t of a warp loads elements 8(4g + t) to 8(4g + t) + 7. These are what it must have of a tensor core's right
operand, four of column g and four of column g + 8, if bits of an element's place number rows and columns of a slab as
``SLAB_BITS`` says. What a product gives is arranged like its operand transposed, so that the second one rotates what
were the columns and leaves everything where it was loaded. Sylvester's matrices are the same for any order of bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton import rotation_matrices
from quarot_fx.lowering.triton.language import between_products, dot

SLAB = tl.constexpr(rotation_matrices.SLAB)
SIDE = tl.constexpr(rotation_matrices.SMALLEST_BLOCK)


@triton.jit
def slab_places(SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    """Return which elements there are of a row, filled up to slabs [ELEMENTS / SLAB, SLAB], and where they are."""
    place = tl.arange(0, ELEMENTS // SLAB)[:, None] * SLAB + tl.arange(0, SLAB)[None, :]
    return place < SIZE, place


@triton.jit
def slabs_rotated(slabs, first, second, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return slabs [n, SLAB] times the two matrices [SIDE, SIDE]: unscaled, in float32."""
    COUNT: tl.constexpr = slabs.shape[0]
    rows_first = tl.permute(tl.reshape(slabs, (COUNT, 8, 4, 2, 2, 2)), (0, 4, 2, 5, 3, 1))
    values = _times(first, tl.reshape(rows_first, (COUNT, SIDE, SIDE)), PRECISION)
    values = _times(second, tl.permute(between_products(values, dtype), (0, 2, 1)), PRECISION)
    columns_first = tl.permute(tl.reshape(values, (COUNT, 2, 8, 2, 4, 2)), (0, 2, 4, 1, 3, 5))
    return tl.reshape(columns_first, (COUNT, SLAB))


@triton.jit
def _times(matrix, values, PRECISION: tl.constexpr):
    matrices = tl.broadcast_to(matrix.to(values.dtype)[None, :, :], values.shape)
    return dot(matrices, values, PRECISION)
