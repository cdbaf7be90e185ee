"""A matrix as codes, and what they change in the outputs of its layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """What rounding makes of a matrix.

    Attributes:
        codes: int8 [rows, n], or uint8 where there are zero points.
        scale, zero: bfloat16 and uint8 [rows, groups]; no zero points if the scheme is symmetric.
        damping: that the Hessian was given, if it was inverted.
        outputs: [rows]: the square of each output, summed over calibration data (and by 2/n).
        changes: [rows]: likewise of its change by rounding.
        nearest_changes: [rows]: likewise of its change by rounding to nearest at the same scales.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    damping: float
    outputs: Tensor
    changes: Tensor
    nearest_changes: Tensor

    @property
    def error(self) -> float:
        """The norm of the change of the outputs by the norm of the outputs."""
        return _relative(self.changes, self.outputs)

    @property
    def nearest_error(self) -> float:
        """The same of rounding to nearest at the same scales."""
        return _relative(self.nearest_changes, self.outputs)

    def split(self, sizes: list[int]) -> Iterator[Rounded]:
        """Cut the rows into parts."""
        fields = (self.codes, self.scale, self.zero, self.outputs, self.changes, self.nearest_changes)
        parts = [[None] * len(sizes) if field is None else field.split(sizes) for field in fields]
        for codes, scale, zero, *sums in zip(*parts, strict=True):
            yield Rounded(codes, scale, zero, self.damping, *sums)


def output_squares(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the diagonal of ``W H W^T``: the squares of what each row of a matrix makes of the inputs, summed."""
    return ((weight @ hessian.to(weight.dtype)) * weight).sum(-1)


def _relative(change: Tensor, whole: Tensor) -> float:
    return float((change.sum() / whole.sum().clamp_min(torch.finfo(whole.dtype).tiny)).clamp_min(0).sqrt())
