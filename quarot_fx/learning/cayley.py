"""Adam on orthogonal matrices: steps in the tangent space, taken by Cayley's transform, which never leaves the manifold
(Li, Fuxin and Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
EPSILON = 1e-30


class CayleyAdam:
    """``Q <- Q (I - S/2)^-1 (I + S/2)``, with S skew: minus the rate times Adam's direction.

    The gradient G of a loss turns Q by ``A = Q^T G - G^T Q``, a skew matrix that says by how much each axis is to turn
    towards each other one. Its moments are kept in these terms, which move with Q, so that nothing is transported.

    Args:
        matrices: orthogonal, float64 [n, n] each.

    Attributes:
        matrices: as they are now, orthogonal to rounding.
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.matrices = [matrix.clone() for matrix in matrices]
        self._means = [torch.zeros_like(matrix) for matrix in matrices]
        self._squares = [torch.zeros_like(matrix) for matrix in matrices]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take a step.

        Args:
            gradients: [n, n] of any floating-point dtype, of the loss by each matrix.
            rate: the angle that each axis turns by, about, while gradients agree.
        """
        self._steps += 1
        for place, (matrix, gradient) in enumerate(zip(self.matrices, gradients, strict=True)):
            turn = matrix.T @ gradient.to(matrix.dtype)
            turn = turn - turn.T
            mean, square = self._means[place], self._squares[place]
            mean.lerp_(turn, 1 - BETAS[0])
            square.lerp_(turn.square(), 1 - BETAS[1])
            corrected = [moment / (1 - beta**self._steps) for moment, beta in zip((mean, square), BETAS, strict=True)]
            direction = corrected[0] / (corrected[1] + EPSILON).sqrt()
            self.matrices[place] = matrix @ _cayley(direction * (-rate / math.sqrt(len(matrix))))


def _cayley(skew: Tensor) -> Tensor:
    """Return the orthogonal matrix ``(I - S/2)^-1 (I + S/2)``, near ``exp(S)``."""
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew / 2, identity + skew / 2)
