"""The small matrices of a Hadamard transform, multiplied in float64, are the rotation that they stand for."""

from __future__ import annotations

import pytest
import torch

from quarot_fx.lowering.triton.rotation_matrices import LARGEST_TILE, Split, matrices, split
from quarot_fx.rotation import Rotation


def rotate(cut: Split, row: torch.Tensor) -> torch.Tensor:
    """Rotate one row as the kernel does."""
    left, middle, right = matrices(cut, torch.device("cpu"), torch.float64)
    filled = torch.zeros(cut.blocks, dtype=torch.float64)
    a, b, c = cut.sizes
    filled[:a, :b, :c] = row.view(a, b, c)
    if right is not None:
        filled = filled @ right
    if left is not None:
        filled = torch.einsum("pa,abc->pbc", left, filled)
    if middle is not None:
        filled = middle @ filled
    assert filled[a:].count_nonzero() == filled[:, b:].count_nonzero() == filled[:, :, c:].count_nonzero() == 0
    return filled[:a, :b, :c].reshape(-1) * cut.norm


@pytest.mark.parametrize(
    ("order", "size", "inner"),
    [
        (64, 64, 1),
        (64, 192, 1),
        (112, 112, 1),
        (4096, 4096, 1),
        (14336, 14336, 1),
        (5, 160, 32),
        (12, 480, 20),
        (9, 18, 1),
    ],
)
def test_products_are_the_rotation(order: int, size: int, inner: int) -> None:
    rotation = Rotation("hadamard", order)
    row = torch.randn(size, dtype=torch.float64)
    cut = split(rotation, size, inner)
    assert cut is not None
    torch.testing.assert_close(rotate(cut, row), rotation.apply(row, -1, inner))


def test_power_of_two_parts_go_to_the_smallest_matrices_that_tensor_cores_take() -> None:
    assert split(Rotation("hadamard", 4096), 4096, 1).sizes == (16, 16, 16)
    assert split(Rotation("hadamard", 28672), 28672, 1).sizes == (28, 32, 32)


def test_what_no_program_can_hold_has_no_split() -> None:
    assert split(Rotation("hadamard", 344), 344, 1) is None  # no product of smaller Hadamard matrices
    assert split(Rotation("hadamard", 4 * LARGEST_TILE), 4 * LARGEST_TILE, 1) is None
    assert split(Rotation("random", 64), 64, 1) is None


@pytest.mark.parametrize(
    ("dtype", "stages", "taken"),
    [(torch.bfloat16, 1, 69632), (torch.bfloat16, 2, 200704), (torch.float16, 1, 137216), (torch.float32, 1, 270336)],
)
def test_shared_memory_is_hardly_more_than_the_compiler_takes(dtype: torch.dtype, stages: int, taken: int) -> None:
    """For 28,672 elements, what Triton 3.6 takes on sm_90."""
    cut = split(Rotation("hadamard", 28672), 28672, 1)
    assert cut is not None
    assert taken <= cut.shared_bytes(dtype, stages) <= 1.1 * taken
