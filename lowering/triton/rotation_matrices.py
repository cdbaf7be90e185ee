"""A rotation of a row as products with at most three small matrices: rows are [a, b, c], rotated by ``L (x) M (x) R``.

A Kronecker product may be cut anywhere between its factors, and Sylvester's powers of two between any two. The cheapest
cuts are taken, with all sizes filled up to powers of two, which tensor cores want. Up to 256 of a row in bfloat16 are
cheapest as slabs that warps rotate by themselves (``rotate_slabs``): only what is left then crosses warps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from quarot_fx.balance import Balance
from quarot_fx.hadamard import Factor, kronecker_factors
from quarot_fx.rotation import Rotation

LARGEST_TILE = 32768  # elements that one program holds in registers, as float32
LARGEST_MATRIX = 128
# Of an element of a matrix and of the row: products of float32 keep both their operands there.
SHARED_BYTES = {torch.bfloat16: (2, 2), torch.float16: (4, 4), torch.float32: (4, 8)}
SHORT_ROW = 4096  # elements; shorter rows are taken several at a time
PASS_COST = 64  # multiply-adds that a pass of an element through shared memory takes the time of
SMALLEST_BLOCK = 16  # of a tensor core's operand
SLAB = 256  # elements of a row that a warp rotates by itself
HEAD_SLABS = 2048  # elements of slabs of heads that a program rotates at a time
SLAB_DTYPE = torch.bfloat16  # of activations, the only one that is as wide between products as it is loaded
# Which bits of an element's place in its slab number the rows of the two matrices that rotate it, the highest first.
SLAB_BITS = ((1, 4, 3, 0), (2, 7, 6, 5))


@dataclass(frozen=True)
class Split:
    """How a row of outer x order x inner elements is rotated.

    Attributes:
        sizes: a, b and c: the row's shape.
        sides: the factors whose Kronecker product rotates each axis; none for the identity.
        outer: the first axis' matrix has so many equal diagonal blocks.
        in_slabs: whether c, a power of two, is rotated in slabs instead of by one matrix; there is no b then.
    """

    sizes: tuple[int, int, int]
    sides: tuple[tuple[Factor, ...], tuple[Factor, ...], tuple[Factor, ...]]
    outer: int
    in_slabs: bool = False

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The powers of two that hold a, b and c."""
        a, b, c = (
            power_of_two_from(size, SMALLEST_BLOCK if side else 1)
            for size, side in zip(self.sizes, self.sides, strict=True)
        )
        return a, b, max(c, SMALLEST_BLOCK)

    @property
    def has_parts(self) -> bool:
        """Whether the first two axes are rotated: a row then falls into parts, each large enough for a tensor core."""
        return bool(self.sides[0] and self.sides[1])

    @property
    def elements(self) -> int:
        """Elements of the row, filled up."""
        return math.prod(self.blocks)

    @property
    def matrix_blocks(self) -> tuple[int, ...]:
        """Rows of the matrices that there are, filled up."""
        present = [block for block, side in zip(self.blocks, self.sides, strict=True) if side]
        return (*present[:-1], SMALLEST_BLOCK, SMALLEST_BLOCK) if self.in_slabs else tuple(present)

    @property
    def cost(self) -> int:
        """Multiply-adds of one row, with as many again for each product whose operand goes through shared memory."""
        passes = bool(self.sides[0]) if self.in_slabs else len(self.matrix_blocks)
        return self.elements * (sum(self.matrix_blocks) + passes * PASS_COST)

    @property
    def fits(self) -> bool:
        """Whether a program can hold the row and the matrices."""
        if self.in_slabs and self.elements % SLAB:
            return False
        return self.elements <= LARGEST_TILE and max(self.matrix_blocks, default=1) <= LARGEST_MATRIX

    @property
    def norm(self) -> float:
        """What the product, whose Hadamard factors have entries +-1, is to be scaled by."""
        orders = (factor.order for side in self.sides for factor in side if factor.family == "hadamard")
        return 1 / math.sqrt(math.prod(orders))

    def shared_bytes(self, dtype: torch.dtype, stages: int = 1) -> int:
        """Return the most shared memory that a program needs for activations of this dtype.

        It holds the matrices, the row on its way from one to the next, and with a second stage the next row and gate.
        """
        matrices = sum(block**2 for block in self.matrix_blocks)
        of_matrix, of_row = SHARED_BYTES[dtype]
        return of_matrix * matrices + (of_row + (2 * dtype.itemsize if stages > 1 else 0)) * self.elements


@cache
def split(rotation: Rotation, size: int, inner: int, dtype: torch.dtype) -> Split | None:
    """Return the cheapest way to rotate a row, or ``None`` if it fits no program or the rotation is not a Hadamard."""
    splits = (s for s in _splits(rotation, size, inner) if s.fits and (dtype == SLAB_DTYPE or not s.in_slabs))
    return min(splits, key=lambda s: s.cost, default=None)


def split_of(x: Tensor, rotation: str, inner: int) -> Split | None:
    """Return how x is rotated, a row at a time or as many short ones as divide all."""
    rows = math.prod(x.shape[:-1])
    together = max(count for count in _rows_together(x) if (isinstance(rows, int) and rows % count == 0) or count == 1)
    return split(Rotation.parse(rotation), together * x.shape[-1], inner, x.dtype)


def possible_splits(x: Tensor, rotation: str, inner: int) -> list[Split]:
    """Return all that ``split_of`` may return for another number of rows."""
    parsed, size = Rotation.parse(rotation), x.shape[-1]
    splits = (split(parsed, count * size, inner, x.dtype) for count in _rows_together(x))
    return [cut for cut in splits if cut is not None]


def head_slabs(rotation: str, size: int, dtype: torch.dtype) -> Split | None:
    """Return how HEAD_SLABS elements of heads are rotated in slabs alone, or ``None`` if heads of this size are not."""
    cut = None if HEAD_SLABS % size else split(Rotation.parse(rotation), HEAD_SLABS, 1, dtype)
    return cut if cut is not None and cut.in_slabs and not cut.sides[0] else None


def _rows_together(x: Tensor) -> list[int]:
    return [1 << power for power in range(max(1, (SHORT_ROW // x.shape[-1]).bit_length()))]


def _splits(rotation: Rotation, size: int, inner: int) -> Iterator[Split]:
    if rotation.kind != "hadamard":
        return
    outer = size // (rotation.order * inner)
    atoms: list[Factor] = []
    for factor in kronecker_factors(rotation.order):
        if factor.family == "identity":
            outer *= factor.order
        elif factor.order & (factor.order - 1):
            atoms.append(factor)
        else:
            atoms += [Factor("hadamard", 2)] * (factor.order.bit_length() - 1)
    last = len(atoms)
    # A plain product on the first axis comes first among equals: that on the second is a batch of products.
    cuts = [(last, last)] if inner > 1 else combinations_with_replacement(range(last + 1), 2)
    for i, j in cuts:
        sides = tuple(atoms[:i]), tuple(atoms[i:j]), tuple(atoms[j:])
        a, b, c = (math.prod(factor.order for factor in side) for side in sides)
        yield Split((outer * a, b, c * inner), sides, outer)
        is_power_of_two = all(factor.order == 2 for factor in sides[2])
        if inner == b == 1 and is_power_of_two and SMALLEST_BLOCK <= c <= SLAB:
            yield Split((outer * a, b, c), sides, outer, in_slabs=True)


@cache  # unbounded: recorded CUDA graphs read them
def matrices(
    split: Split, device: torch.device, dtype: torch.dtype, inverse: bool = False
) -> tuple[Tensor | None, ...]:
    """Return L^T, M^T and R, or L, M and R^T for the inverse, filled up with zeros, Hadamard factors as +-1.

    In slabs, M and R are the second and the first matrix of a slab. All are cast before they are copied, so that no
    kernel makes them: kernels read them before they wait for others.
    """
    left, middle, right = (
        kronecker_product(side, block, split.outer if axis == 0 else 1, (axis < 2) != inverse) if side else None
        for axis, (side, block) in enumerate(zip(split.sides, split.blocks, strict=True))
    )
    if split.in_slabs:
        right, middle = (_slab_matrix(bits, len(split.sides[2])) for bits in SLAB_BITS)
    return tuple(None if matrix is None else matrix.to(dtype).to(device) for matrix in (left, middle, right))


@dataclass(frozen=True)
class HeadMatrices:
    """What heads are multiplied with.

    Attributes:
        values: of a Hadamard +-1, [matrices, block, block], filled up with zeros.
        norm: what a product is to be scaled by.
    """

    values: Tensor
    norm: float

    @property
    def block(self) -> int:
        """Elements of a head, filled up."""
        return self.values.shape[-1]

    def sharing(self, heads: int) -> int | None:
        """Return how many of so many heads in a row have the same matrix, or ``None`` if all have."""
        return None if len(self.values) == 1 else heads // len(self.values)


@cache  # unbounded: recorded CUDA graphs read them
def head_matrices(
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    rotation: str | None,
    balance: str | None = None,
    inverse: bool = False,
) -> HeadMatrices:
    """Return a rotation of heads, or the product of their balance, or of its inverse, with it."""
    if balance is not None:
        dense, norm = Balance.parse(balance).matrices(inverse, rotation), 1.0
    else:
        assert rotation is not None, "heads stay as they are"
        q = Rotation.parse(rotation).matrix()
        dense = torch.kron(torch.eye(size // len(q), dtype=q.dtype), q)[None]
        norm = dense.abs().max().item()
    block = power_of_two_from(size)
    filled = torch.zeros(len(dense), block, block, dtype=dense.dtype)
    filled[:, :size, :size] = dense / norm
    return HeadMatrices(filled.to(dtype).to(device), norm)  # cast first: a kernel may read them before it waits


@cache  # unbounded: recorded CUDA graphs read them
def head_matrices_by_thread(
    size: int, device: torch.device, dtype: torch.dtype, rotation: str | None, balance: str | None = None
) -> HeadMatrices:
    """Return the same with columns, and rows of each half, in the places that a tensor core gives to a thread.

    The four threads of a row of a product have two neighbouring elements of every eight each: here a quarter of a half
    of what is rotated, and a quarter of the result.
    """
    of_heads = head_matrices(size, torch.device("cpu"), dtype, rotation, balance)
    column = torch.arange(size).view(4, -1, 2).transpose(0, 1).flatten()
    row = torch.arange(size).view(2, 4, -1, 2).transpose(1, 2).flatten()
    return HeadMatrices(of_heads.values[:, row][..., column].contiguous().to(device), of_heads.norm)


def kronecker_product(side: tuple[Factor, ...], block: int, outer: int, transposed: bool) -> Tensor:
    """Return the product of factors as ``outer`` diagonal blocks, filled up with zeros, Hadamard factors as +-1."""
    arrays = [f.array() * (math.sqrt(f.order) if f.family == "hadamard" else 1) for f in side]
    product = torch.from_numpy(reduce(lambda a, b: np.kron(a, b), [np.eye(outer), *arrays]))
    filled = torch.zeros(block, block, dtype=torch.float64)
    filled[: len(product), : len(product)] = product.mT if transposed else product
    return filled


def _slab_matrix(bits: tuple[int, ...], rotated: int) -> Tensor:
    """Return the matrix whose rows these bits number, the lowest of a slab's bits being rotated, so many of them."""
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return reduce(torch.kron, [hadamard if bit < rotated else torch.eye(2, dtype=torch.float64) for bit in bits])


def power_of_two_from(size: int, smallest: int = SMALLEST_BLOCK) -> int:
    """Return the smallest power of two that holds a size and is no smaller than ``smallest``."""
    return max(smallest, 1 << (size - 1).bit_length())
