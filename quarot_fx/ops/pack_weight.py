"""``quarot::pack_weight``: codes of a weight in the layout that integer matrix products read.

This is the one place that says what the layout is. A row of 4-bit codes is cut into blocks of 256. Byte j of a block
holds code j in its low nibble and code 128 + j in its high one, so that a masked word is four neighbouring codes, ready
for a tensor core, and each half meets a contiguous run of activations (and at most one group of 128). Nibbles are
u = q + 8 for signed codes q: 0 to 15, which are also the bits of the float8_e4m3 numbers u 2^-9. The last block is
filled up with u = 8. Codes of 8 bits are int8, unsigned ones less 128. Any zero point refers to the stored numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quarot_fx.errors import OptionError
from quarot_fx.ops.declaration import OpDeclaration, declare

BLOCK = 256  # codes of 4 bits, 128 bytes
NIBBLE_OFFSET = 8  # of the nibble that stands for 0, where codes are signed


def packed_width(size: int, bits: int) -> int:
    """Return the bytes of a row of ``size`` codes of 4 or 8 bits.

    Raises:
        OptionError: there is no layout for this number of bits.
    """
    if bits not in (4, 8):
        raise OptionError(name="bits", value=bits, reason="integer matrix products read 4 or 8 bits")
    return size if bits == 8 else -(-size // BLOCK) * BLOCK // 2


def weight_codes(packed: Tensor, bits: int, size: int) -> Tensor:
    """Return the stored numbers [..., size] as int32: u, 0 to 15, of 4 bits, or int8 of 8."""
    if bits == 8:
        return packed.int()
    blocks = packed.unflatten(-1, (-1, BLOCK // 2)).int()
    return torch.cat([blocks & 15, blocks >> 4], -1).flatten(-2)[..., :size]


def _reference(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 [..., ceil(n / 256) 128] for 4 bits, int8 [..., n] for 8, of codes int8 or uint8 [..., n]."""
    width = packed_width(codes.shape[-1], bits)
    signed = codes.dtype == torch.int8
    if bits == 8:
        return (codes if signed else codes ^ 128).view(torch.int8).clone(memory_format=torch.contiguous_format)
    nibbles = (codes.view(torch.uint8) ^ NIBBLE_OFFSET if signed else codes) & 15
    filled = pad(nibbles, (0, 2 * width - codes.shape[-1]), value=NIBBLE_OFFSET)
    low, high = filled.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2).contiguous()


def _fake(codes: Tensor, bits: int) -> Tensor:
    shape = (*codes.shape[:-1], packed_width(codes.shape[-1], bits))
    return codes.new_empty(shape, dtype=torch.uint8 if bits == 4 else torch.int8)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for bits, size in ((4, 256), (4, 600), (4, 5), (8, 48), (8, 5)):
        half = 2 ** (bits - 1)
        yield torch.randint(-half, half, (3, size), dtype=torch.int8, generator=generator), bits
        yield torch.randint(0, 2 * half, (2, 3, size), dtype=torch.uint8, generator=generator), bits
    yield torch.zeros(0, 5, dtype=torch.int8), 4


pack_weight = declare(
    OpDeclaration(
        schema="pack_weight(Tensor codes, int bits) -> Tensor", reference=_reference, fake=_fake, inputs=_inputs
    )
)
