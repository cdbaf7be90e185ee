"""The small matrices of a Hadamard transform, multiplied in float64, are the rotation that they stand for."""

from __future__ import annotations

import pytest
import torch

from quarot_fx.lowering.triton.rotation_matrices import LARGEST_TILE, SLAB_BITS, Split, matrices, split
from quarot_fx.lowering.triton.stacked_slabs import stacked
from quarot_fx.rotation import Rotation


def rotate(cut: Split, row: torch.Tensor) -> torch.Tensor:
    """Rotate one row as the kernel does."""
    left, middle, right = matrices(cut, torch.device("cpu"), torch.float64)
    filled = torch.zeros(cut.blocks, dtype=torch.float64)
    a, b, c = cut.sizes
    filled[:a, :b, :c] = row.view(a, b, c)
    if cut.in_slabs:
        filled = rotate_slabs(filled, right, middle)
    elif right is not None:
        filled = filled @ right
    if left is not None:
        filled = torch.einsum("pa,abc->pbc", left, filled)
    if middle is not None and not cut.in_slabs:
        filled = middle @ filled
    assert filled[a:].count_nonzero() == filled[:, b:].count_nonzero() == filled[:, :, c:].count_nonzero() == 0
    return filled[:a, :b, :c].reshape(-1) * cut.norm


def rotate_slabs(filled: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rotate rows and columns of slabs, each a matrix whose rows and columns are numbered by some of a place's bits."""
    order = [0, *(8 - bit for bits in SLAB_BITS for bit in bits)]  # axis 0 counts slabs, axis 1 is bit 7
    slabs = filled.reshape(-1, *[2] * 8).permute(order)
    rotated = (first @ slabs.reshape(-1, 16, 16) @ second.T).reshape(slabs.shape)
    return rotated.permute([order.index(axis) for axis in range(9)]).reshape(filled.shape)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # in slabs, and not
def test_products_are_the_rotation(order: int, size: int, inner: int, dtype: torch.dtype) -> None:
    rotation = Rotation("hadamard", order)
    row = torch.randn(size, dtype=torch.float64)
    cut = split(rotation, size, inner, dtype)
    assert cut is not None
    torch.testing.assert_close(rotate(cut, row), rotation.apply(row, -1, inner))


@pytest.mark.parametrize(("order", "rest"), [(1536, 12), (4096, 16), (5120, 20), (9728, 76), (14336, 56), (28672, 112)])
def test_warps_rotate_as_much_as_they_can_by_themselves(order: int, rest: int) -> None:
    cut = split(Rotation("hadamard", order), order, 1, torch.bfloat16)
    assert cut is not None
    assert cut.in_slabs
    assert cut.sizes == (rest, 1, order // rest)


def test_power_of_two_parts_go_to_the_smallest_matrices_that_tensor_cores_take() -> None:
    cuts = [split(Rotation("hadamard", order), order, 1, torch.float16) for order in (4096, 28672)]
    assert [cut and cut.sizes for cut in cuts] == [(16, 16, 16), (28, 32, 32)]


def test_what_no_program_can_hold_has_no_split() -> None:
    assert split(Rotation("hadamard", 344), 344, 1, torch.bfloat16) is None  # no product of smaller Hadamard matrices
    assert split(Rotation("hadamard", 4 * LARGEST_TILE), 4 * LARGEST_TILE, 1, torch.bfloat16) is None
    assert split(Rotation("random", 64), 64, 1, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("dtype", "stages", "taken"),
    [(torch.bfloat16, 1, 98304), (torch.bfloat16, 2, 229376), (torch.float16, 1, 137216), (torch.float32, 1, 270336)],
)
def test_shared_memory_is_hardly_more_than_the_compiler_takes(dtype: torch.dtype, stages: int, taken: int) -> None:
    """For 28,672 elements, what Triton 3.6 takes on sm_90."""
    cut = split(Rotation("hadamard", 28672), 28672, 1, dtype)
    assert cut is not None
    assert taken <= cut.shared_bytes(dtype, stages) <= 1.1 * taken


@pytest.mark.parametrize(
    ("order", "count", "together"), [(8192, 32, 1), (14336, 28, 2), (16384, 32, 2), (28672, 28, 4)]
)
def test_slabs_are_stacked_in_steps_that_are_nearly_full(order: int, count: int, together: int) -> None:
    cut = split(Rotation("hadamard", order), order, 1, torch.bfloat16)
    assert cut is not None
    slabs = stacked(cut)
    assert slabs is not None
    assert (slabs.count, slabs.together) == (count, together)


@pytest.mark.parametrize(
    ("order", "size", "inner"), [(4096, 4096, 1), (5120, 5120, 1), (4096, 8192, 1), (64, 8192, 128)]
)
def test_other_rows_are_not_stacked(order: int, size: int, inner: int) -> None:
    cut = split(Rotation("hadamard", order), size, inner, torch.bfloat16)
    assert cut is not None
    assert stacked(cut) is None
