"""How keys and values are coded: as rotated numbers of a few bits with a scale and a zero point, or as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quarot_fx import ops
from quarot_fx.config import UNQUANTIZED_BITS

Parts = tuple[Tensor, ...]


class Format(Protocol):
    """A code for vectors x [..., d]. Its parts, like x, have one entry for each vector in all axes but the last."""

    @property
    def bits(self) -> int:
        """Width of a code."""

    def quantize(self, x: Tensor) -> Parts:
        """Return the codes [..., d], and what else it takes to read them."""

    def dequantize(self, quantized: Parts, dtype: torch.dtype) -> Tensor:
        """Return what codes mean, [..., d]."""

    def pack(self, quantized: Parts) -> Parts:
        """Return codes as they are stored."""

    def unpack(self, packed: Parts, size: int) -> Parts:
        """Return stored codes of ``size`` elements a vector, one an element."""


@dataclass(frozen=True)
class QuantizedFormat:
    """``x H -> codes, scale, zero`` per vector or group of it (QuaRot, section 4, stage 2c).

    Attributes:
        bits: 2 to 8.
        group: elements that share a scale, a divisor of d; ``None`` means d.
        clip: ratio in (0, 1] of the range that the codes cover.
        rotation: ``"hadamard"``, or ``"none"`` to code x itself.
        balance: matrices that x is multiplied by before, by name.
    """

    bits: int
    group: int | None = None
    clip: float = 0.95
    rotation: str = "hadamard"
    balance: str | None = None

    def quantize(self, x: Tensor) -> Parts:
        """Return codes uint8 [..., d], scale float32 and zero uint8 [..., d / group]."""
        return ops.quantize_asymmetric(self._rotate(self._balance(x)), self.bits, self.group, self.clip)

    def dequantize(self, quantized: Parts, dtype: torch.dtype) -> Tensor:
        """Return x, rounded, [..., d]."""
        return self._balance(self._rotate(ops.dequantize(*quantized, dtype), inverse=True), inverse=True)

    def pack(self, quantized: Parts) -> Parts:
        """Pack the codes to uint8 [..., ceil(d * bits / 8)]."""
        codes, scale, zero = quantized
        return ops.pack(codes, self.bits), scale, zero

    def unpack(self, packed: Parts, size: int) -> Parts:
        """Return codes uint8 [..., size], scale and zero."""
        codes, scale, zero = packed
        return ops.unpack(codes, self.bits, size, False), scale, zero

    def _balance(self, x: Tensor, inverse: bool = False) -> Tensor:
        return x if self.balance is None else ops.balance(x, self.balance, inverse)

    def _rotate(self, x: Tensor, inverse: bool = False) -> Tensor:
        if self.rotation == "none":
            return x
        return ops.rotate(x, f"{self.rotation}-{x.shape[-1]}", inverse=inverse)


@dataclass(frozen=True)
class PlainFormat:
    """``x -> x``: numbers stay in the model's dtype, in the basis that they come in."""

    bits: int = UNQUANTIZED_BITS

    def quantize(self, x: Tensor) -> Parts:
        """Return x."""
        return (x,)

    def dequantize(self, quantized: Parts, dtype: torch.dtype) -> Tensor:
        """Return x in a dtype."""
        return quantized[0].to(dtype)

    def pack(self, quantized: Parts) -> Parts:
        """Return x."""
        return quantized

    def unpack(self, packed: Parts, size: int) -> Parts:
        """Return x."""
        return packed
