"""``quarot::project_out``: LayerNorm's centring, in any basis.

Subtracting the mean removes the component along u = 1/sqrt(n); where a rotation Q has changed the basis, that
is the component along ``u @ Q`` (SliceGPT, arXiv 2401.15024, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def _reference(x: Tensor, u: Tensor) -> Tensor:
    """Return x - (x . u) u along the last axis, for a unit vector u [n]; computed in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, u = x.to(dtype), u.to(dtype)
    return (y - (y @ u)[..., None] * u).to(x.dtype).contiguous()


def _fake(x: Tensor, u: Tensor) -> Tensor:
    torch._check(u.shape == x.shape[-1:], lambda: f"u {u.shape} does not fit the last axis of {x.shape}")
    return x.new_empty(x.shape)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    x = torch.randn(2, 5, 48, generator=generator)
    u = torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield x.to(dtype), u
    yield torch.randn(5, 48, 2, generator=generator).mT, u
    yield x[:0], u
    yield x[0, 0], u


project_out = declare(
    OpDeclaration(
        schema="project_out(Tensor x, Tensor u) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float64: 1e-12, torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
