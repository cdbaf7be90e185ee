"""What GPTQ knows of a layer's inputs: the second moments of the rows that meet one matrix."""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """``H = 2/n sum x x^T`` over n rows x, of the error ``|(W - W') x|^2`` that rounding makes of each output.

    Products are computed in float32 at least, and summed in float64.

    Args:
        size: elements of a row.
        device: where the matrix is kept.
        with_target: also keep ``D = 2/n sum (y - x) x^T``, for the rows y that the inputs should have been.

    Attributes:
        rows: n.
    """

    def __init__(self, size: int, device: torch.device, with_target: bool = False) -> None:
        self.rows = 0
        self._moments = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._shifts = torch.zeros_like(self._moments) if with_target else None

    def add(self, x: Tensor, target: Tensor | None = None) -> None:
        """Take rows x [n, size] into account and, where that is kept, the rows [n, size] that they should have been."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.rows += len(x)
        self._moments += x.T @ x
        if self._shifts is not None and target is not None:
            self._shifts += (target.to(x.dtype) - x).T @ x

    @property
    def matrix(self) -> Tensor:
        """H, float64 [size, size]; zeros before any row was added."""
        return self._moments * (2 / max(self.rows, 1))

    @property
    def shifts(self) -> Tensor | None:
        """D, float64 [size, size], if it is kept."""
        return None if self._shifts is None else self._shifts * (2 / max(self.rows, 1))


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return H with ``damping`` times the mean of its diagonal added to its diagonal."""
    result = matrix.clone()
    result.diagonal().add_(damping * matrix.diagonal().mean())
    return result


def upper_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper triangular R with ``R R^T = H``, or ``None`` if H is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return None if failed else factor.flip(0, 1)


def inverse_factor(upper: Tensor) -> Tensor:
    """Return the upper triangular U with ``U^T U = H^-1``, given R with ``R R^T = H``: the inverse of R."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)
