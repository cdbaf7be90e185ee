"""``quarot::mean_square``: the statistic of RMSNorm, which is the same in every orthonormal basis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def _reference(x: Tensor) -> Tensor:
    """Return the mean of x^2 over the last axis, which stays with size 1; in the dtype of x."""
    return x.square().mean(-1, keepdim=True).contiguous()


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1))


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    x = torch.randn(2, 5, 48, generator=generator)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield (x.to(dtype),)
    yield (x.transpose(0, 2),)
    yield (x[:0],)
    yield (x[0, 0],)


mean_square = declare(
    OpDeclaration(
        schema="mean_square(Tensor x) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float64: 1e-12, torch.float32: 1e-6, **HALF_TOLERANCE},
    )
)
