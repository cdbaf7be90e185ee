"""``quarot::interleave_rows``: the weights of a gate and of what it multiplies as one, whose results meet in registers.

This is the one place that says how their rows alternate: 8 of the gate, then 8 of the other. A thread of a tensor core
holds rows r and r + 8 of every 16 that it computes, so that it has a gate and what it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.errors import OptionError
from quarot_fx.ops.declaration import OpDeclaration, declare

ROWS = 8


def separate(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the gate's rows made and what the others made, [..., n] each, of what all made, [..., 2 n].

    Raises:
        OptionError: ``ROWS`` does not divide n.
    """
    size = products.shape[-1] // 2
    _check(size, 2 * size == products.shape[-1])
    gate, up = products.unflatten(-1, (size // ROWS, 2, ROWS)).unbind(-2)
    return gate.flatten(-2), up.flatten(-2)


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return [2 rows, ...] of two tensors [rows, ...] of one shape and dtype, which 8 divides.

    Raises:
        OptionError: 8 does not divide the rows, or shapes differ.
    """
    _check(len(gate), gate.shape == up.shape)
    return torch.stack([gate.unflatten(0, (-1, ROWS)), up.unflatten(0, (-1, ROWS))], 1).flatten(0, 2)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    _check(len(gate), gate.shape == up.shape)
    return gate.new_empty((2 * len(gate), *gate.shape[1:]))


def _check(rows: int, is_pair: bool) -> None:
    if rows % ROWS or not is_pair:
        raise OptionError(name="rows", value=rows, reason=f"gates alternate with what they multiply {ROWS} by {ROWS}")


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for shape in ((8,), (24, 3), (16, 2, 5)):
        yield tuple(torch.randn(2, *shape, generator=generator).unbind())
    yield tuple(torch.randint(0, 256, (2, 40, 128), dtype=torch.uint8, generator=generator).unbind())


interleave_rows = declare(
    OpDeclaration(
        schema="interleave_rows(Tensor gate, Tensor up) -> Tensor", reference=_reference, fake=_fake, inputs=_inputs
    )
)
