"""``quarot::rotate``: a change of basis that runs online."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.rotation import Rotation


def _reference(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> Tensor:
    return Rotation.parse(rotation).apply(x, dim, inner, inverse)


def _fake(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> Tensor:
    Rotation.parse(rotation).check_fits(x, dim, inner)
    return x.new_empty(x.shape)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    x = torch.randn(2, 3, 48, generator=generator)
    yield x, "hadamard-48"
    yield x.double(), "random-hadamard-48-seed1", -1, 1, True
    yield x.bfloat16(), "random-12-seed2", 2, 4
    yield x.transpose(0, 2), "hadamard-12", 0, 4  # not contiguous
    yield torch.randn(2, 18, 5, generator=generator), "hadamard-9", 1, 2
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, rotation, inner, inverse in (
            ((2, 3, 5, 64), "hadamard-64", 1, True),
            ((1, 8, 1, 128), "hadamard-128", 1, False),
            ((3, 240), "hadamard-12", 20, True),  # across heads
            ((2, 1, 448), "hadamard-448", 1, False),
            ((2, 3072), "hadamard-3072", 1, True),
        ):
            yield torch.randn(shape, generator=generator).to(dtype), rotation, -1, inner, inverse
    yield x[:0], "hadamard-16"
    yield x, "hadamard-1"


rotate = declare(
    OpDeclaration(
        schema="rotate(Tensor x, str rotation, int dim=-1, int inner=1, bool inverse=False) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        is_traceable=False,  # it makes matrices
        tolerance={torch.float64: 1e-12, torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
