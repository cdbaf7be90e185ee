"""Rows of K x R x 256 elements in shared memory: who has what on its way there and back (``rotate_quantize_shared``).

Sylvester's matrix of a slab is the same for any order of the bits of an element's place, so that a product that mixes
four of them may leave them wherever tensor cores put rows of a result. They are put so that a thread has eight
elements for 16 neighbouring bytes of shared memory, and of the product with the matrix of K 16 neighbouring codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from quarot_fx.hadamard import Factor, hadamard
from quarot_fx.lowering.triton.explicit_layouts import jit
from quarot_fx.lowering.triton.rotation_matrices import SLAB, SLAB_DTYPE, Split, kronecker_product

SLAB_SIZE = tl.constexpr(SLAB)
SIDE = tl.constexpr(16)  # of the two matrices that rotate a slab
STEP = tl.constexpr(8)  # rows of K that are stored at a time, and that eight threads read from all banks
BLOCK_K = tl.constexpr(32)  # K filled up, by less than a step
MOST_TOGETHER = 4  # slabs, R of a row
# Bits of a place in a slab, the lowest first. As it is loaded, a thread has 0 to 2, and the others number threads.
MIXED = ((0, 3, 4, 2), (5, 6, 7, 1))  # that number the rows of the right operands of a slab's two products
LEFT = ((0, 2, 3, 4), (1, 6, 7, 5))  # the same, as they number the rows of the results


@dataclass(frozen=True)
class StackedSlabs:
    """How a row is rotated of which R slabs at a time are added and subtracted.

    Attributes:
        factors: those whose Kronecker product rotates K rows of R slabs.
        together: R.
        norm: what the product, whose Hadamard factors have entries +-1, is to be scaled by.
    """

    factors: tuple[Factor, ...]
    together: int
    norm: float

    @property
    def count(self) -> int:
        """K."""
        return math.prod(factor.order for factor in self.factors)

    @property
    def warps(self) -> int:
        """Warps of a program: a thread has 128 elements in the end, or 64 where R is 1."""
        return 4 * math.ceil(self.together / 2)


@cache
def stacked(cut: Split) -> StackedSlabs | None:
    """Return how a row that is rotated in slabs can be kept in shared memory meanwhile, or ``None`` if it cannot."""
    factors, together = cut.sides[0], 1
    while together < MOST_TOGETHER and math.prod(f.order for f in factors) > BLOCK_K.value and factors[-1].order == 2:
        factors, together = factors[:-1], 2 * together
    slabs = StackedSlabs(factors, together, cut.norm)
    is_whole = cut.in_slabs and cut.outer == 1 and len(cut.sides[2]) == SLAB.bit_length() - 1
    return slabs if is_whole and BLOCK_K.value - STEP.value < slabs.count <= BLOCK_K.value else None


@cache  # unbounded: recorded CUDA graphs read them
def stacked_matrices(slabs: StackedSlabs, device: torch.device) -> tuple[Tensor, ...]:
    """Return the matrix of K, filled up with zeros, and the two of a slab, as ``rotation_matrices.matrices`` does."""
    left = kronecker_product(slabs.factors, BLOCK_K.value, outer=1, transposed=True)
    of_slab = (_sylvester(rows, columns) for rows, columns in zip(LEFT, MIXED, strict=True))
    return tuple(matrix.to(SLAB_DTYPE).to(device) for matrix in (left, *of_slab))


def _sylvester(rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Return Sylvester's matrix whose rows and columns these bits number, which are the same in another order."""
    in_order = sorted(rows)
    row, column = (
        [sum((number >> place & 1) << in_order.index(bit) for place, bit in enumerate(bits)) for number in range(16)]
        for bits in (rows, columns)
    )
    return hadamard(SIDE.value)[row][:, column]


@lru_cache
def stacked_layouts(slabs: StackedSlabs) -> dict[str, Any]:
    """Return the layouts of a program.

    LOADED is that of [R * STEP, SLAB] elements, SLABS of the products of these, MEMORY of [BLOCK_K, R * SLAB] elements
    in shared memory, PRODUCT of a block of columns after the matrix of K, and CODES of its words of four codes.
    """
    warps = slabs.warps
    powers = [1 << bit for bit in range((slabs.together * SLAB).bit_length() - 1)]
    of_warps = [power for power in powers if 8 <= power < 8 * warps]
    tiles = [8 * warps, 16 * warps, 32 * warps]  # columns that follow each other in a thread
    # 16 bytes of eight rows are in all banks, and of eight threads that have one row.
    columns = [1, 2, 4, *tiles, *of_warps, *(power for power in powers if power > tiles[-1])]
    rows = [[1, tiles[0]], [2, tiles[1]], [4, tiles[2]], [8, 0], [16, 0]]
    return {
        "LOADED": gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0]),
        "SLABS": gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8]),
        "MEMORY": gl.SharedLinearLayout([[0, column] for column in columns] + rows),
        "PRODUCT": gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, warps], instr_shape=[16, 8]),
        "CODES": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [8, 0], [16, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
            [[0, 2 * power] for power in of_warps], [], [BLOCK_K.value, 16 * warps],
        ),
    }  # fmt: skip


@jit
def as_operand(slabs):
    """Return slabs [n, SLAB] as [n, SIDE, SIDE], rows and columns numbered by both of MIXED."""
    bits = tl.reshape(slabs, (slabs.shape[0], 2, 2, 2, 2, 2, 2, 2, 2))  # the highest first
    bits = tl.permute(bits, (0, 6, 4, 5, 8, 7, 1, 2, 3))
    return tl.reshape(bits, (slabs.shape[0], SIDE, SIDE))


@jit
def as_columns(slabs, R: tl.constexpr, WARPS: tl.constexpr):
    """Return [n, SIDE, SIDE, R], rows numbered by the second of LEFT and columns by the first, as rows of MEMORY.

    Columns of a block are numbered by bits 0, 4 and 5 of a place, by 6, 7 and a slab's, as of warps, and by 1, 2 and 3.
    """
    TOGETHER: tl.constexpr = WARPS // 4  # slabs of a block
    bits = tl.reshape(slabs, (slabs.shape[0], 2, 2, 2, 2, 2, 2, 2, 2, R // TOGETHER, TOGETHER))
    bits = tl.permute(bits, (0, 9, 6, 7, 4, 10, 2, 3, 1, 5, 8))
    return tl.reshape(bits, (slabs.shape[0], R * SLAB_SIZE))


@jit
def in_order(pairs, WARPS: tl.constexpr):
    """Return pairs [n, 32 * WARPS] of columns of a block as [n, 16 * WARPS, 2], in the order of a row."""
    bits = tl.reshape(pairs, (pairs.shape[0], 4, 2, WARPS, 4))
    return tl.reshape(tl.permute(bits, (0, 3, 4, 1, 2)), (pairs.shape[0], 16 * WARPS, 2))


@jit
def by_thread(columns, WARPS: tl.constexpr):
    """Return [BLOCK_K, 64 * WARPS] of a block as [32 * WARPS, 64]: what a thread has is a row."""
    bits = tl.reshape(columns, (4, 8, 8, 4 * WARPS, 2))
    return tl.reshape(tl.permute(bits, (1, 3, 0, 2, 4)), (32 * WARPS, 64))
