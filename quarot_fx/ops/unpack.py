"""``quarot::unpack``: the codes of a packed stream of bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.errors import OptionError
from quarot_fx.ops.affine import code_range
from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.pack import packed_size, regroup_bits


def _reference(packed: Tensor, bits: int, size: int, signed: bool) -> Tensor:
    """Return the codes [..., size] that ``quarot::pack`` packed: int8 if signed, else uint8."""
    _check(packed, bits, size)
    codes = regroup_bits(packed, bits, 8, bits)[..., :size]
    if not signed:
        return codes.to(torch.uint8).contiguous()
    sign_bit = 2 ** (bits - 1)
    return ((codes ^ sign_bit) - sign_bit).to(torch.int8).contiguous()


def _fake(packed: Tensor, bits: int, size: int, signed: bool) -> Tensor:
    _check(packed, bits, size)
    return packed.new_empty((*packed.shape[:-1], size), dtype=torch.int8 if signed else torch.uint8)


def _check(packed: Tensor, bits: int, size: int) -> None:
    code_range(bits, signed=False)
    if packed.shape[-1] != packed_size(size, bits):
        held = f"{packed.shape[-1]} bytes hold another number of {bits}-bit codes"
        raise OptionError(name="size", value=size, reason=held)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for bits in range(2, 9):
        for size in (16, 21):
            shape = (2, 3, packed_size(size, bits))
            packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            yield packed, bits, size, True
            yield packed, bits, size, False
    yield torch.zeros(0, 3, dtype=torch.uint8), 4, 5, True


unpack = declare(
    OpDeclaration(
        schema="unpack(Tensor packed, int bits, SymInt size, bool signed) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
    )
)
