"""``quarot::expert_linear``: a linear layer whose weight every row chooses from a stack.

What a mixture of experts computes for each token and expert, written as one op, so that no copy of a whole matrix for
each row stands between the stack and the passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def _reference(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Return ``y[i] = weight[experts[i]] @ x[i]`` for x [n, in], weight [experts, out, in], experts [n]."""
    return torch.bmm(weight[experts], x[..., None])[..., 0]


def _fake(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[-1], lambda: f"x {x.shape} does not fit weight {weight.shape}")
    return x.new_empty(x.shape[0], weight.shape[1])


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    weight = torch.randn(3, 5, 8, generator=generator)
    x = torch.randn(7, 8, generator=generator)
    experts = torch.randint(3, (7,), generator=generator)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        yield x.to(dtype), weight.to(dtype), experts
    yield x, weight, torch.zeros_like(experts)  # all rows choose one
    yield x[:1], weight, experts[:1]
    yield x[:0], weight, experts[:0]
    yield torch.randn(8, 7, generator=generator).T, weight.mT.contiguous().mT, experts


expert_linear = declare(
    OpDeclaration(
        schema="expert_linear(Tensor x, Tensor weight, Tensor experts) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float64: 1e-12, torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
