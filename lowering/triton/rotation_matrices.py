"""A rotation of a row as products with two small matrices: rows are [a, b], and ``Q^T row = L^T X R``.

A Kronecker product may be cut anywhere between its factors, and Sylvester's powers of two between any two: the cut that
costs the fewest multiply-adds is taken, with all sizes filled up to powers of two, which tensor cores want.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quarot_fx.hadamard import Factor, kronecker_factors
from quarot_fx.rotation import Rotation

LARGEST_TILE = 16384  # elements that one program holds in registers, as float32
LARGEST_MATRIX = 256
SMALLEST_BLOCK = 16  # of a tensor core's operand


@dataclass(frozen=True)
class Split:
    """How a row of outer x order x inner elements is rotated.

    Attributes:
        a, b: the row's shape.
        left, right: factors whose Kronecker products rotate each side; none for the identity.
        outer: how many equal blocks a side's matrix has: the left one's.
    """

    a: int
    b: int
    left: tuple[Factor, ...]
    right: tuple[Factor, ...]
    outer: int

    @property
    def blocks(self) -> tuple[int, int]:
        """The powers of two that hold a and b."""
        return power_of_two_from(self.a), power_of_two_from(self.b)

    @property
    def cost(self) -> int:
        """Multiply-adds of one row."""
        a, b = self.blocks
        return a * b * (a * bool(self.left) + b * bool(self.right))

    @property
    def fits(self) -> bool:
        """Whether a program can hold the row and the matrices."""
        a, b = self.blocks
        left, right = a if self.left else 1, b if self.right else 1
        return a * b <= LARGEST_TILE and max(left, right) <= LARGEST_MATRIX

    def shared_bytes(self, itemsize: int) -> int:
        """Return the shared memory of a program: both matrices, and the row on its way from one to the other."""
        a, b = self.blocks
        return itemsize * (a * a * bool(self.left) + b * b * bool(self.right) + a * b)

    @property
    def norm(self) -> float:
        """What the product, whose Hadamard factors have entries +-1, is to be scaled by."""
        factors = (factor for factor in self.left + self.right if factor.family == "hadamard")
        return 1 / math.sqrt(math.prod(factor.order for factor in factors))


@cache
def split(rotation: Rotation, size: int, inner: int) -> Split | None:
    """Return the cheapest way to rotate a row, or ``None`` if it fits no program or the rotation is not a Hadamard."""
    if rotation.kind != "hadamard":
        return None
    return min((s for s in _splits(rotation, size, inner) if s.fits), key=lambda s: s.cost, default=None)


def _splits(rotation: Rotation, size: int, inner: int) -> Iterator[Split]:
    outer = size // (rotation.order * inner)
    atoms: list[Factor] = []
    for factor in kronecker_factors(rotation.order):
        if factor.family == "identity":
            outer *= factor.order
        elif factor.order & (factor.order - 1):
            atoms.append(factor)
        else:
            atoms += [Factor("hadamard", 2)] * (factor.order.bit_length() - 1)
    order = math.prod(factor.order for factor in atoms)
    for place in range(len(atoms) + 1) if inner == 1 else [len(atoms)]:
        left, right = tuple(atoms[:place]), tuple(atoms[place:])
        b = math.prod(factor.order for factor in right)
        yield Split(outer * order // b, b * inner, left, right, outer)


@lru_cache(maxsize=64)
def matrices(
    split: Split, device: torch.device, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return L^T and R, filled up with zeros, Hadamard factors as +-1."""
    a, b = split.blocks
    left = np.kron(np.eye(split.outer), _product(split.left)).T if split.left else None
    right = _product(split.right) if split.right else None
    return _filled(left, a, device, left_dtype), _filled(right, b, device, right_dtype)


def _product(factors: tuple[Factor, ...]) -> NDArray[np.floating]:
    arrays = [f.array() * (math.sqrt(f.order) if f.family == "hadamard" else 1) for f in factors]
    return reduce(lambda a, b: np.kron(a, b), arrays)


def _filled(matrix: NDArray[np.floating] | None, size: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if matrix is None:
        return None
    filled = torch.zeros(size, size, dtype=dtype)
    filled[: len(matrix), : len(matrix)] = torch.from_numpy(matrix)
    return filled.to(device)


def power_of_two_from(size: int) -> int:
    """Return the smallest power of two, from a tensor core's smallest block on, that holds a size."""
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())
