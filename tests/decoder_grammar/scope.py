"""What productions take their weights and inputs from, and where they leave outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes of a program. Small, so that different axes often have one size, and a mistaken axis shows.

    ``hidden`` need not be ``kv_heads * repeats * head_dim``, and nothing need be a power of two.
    """

    batch: int
    tokens: int
    hidden: int
    inner: int
    kv_heads: int
    repeats: int
    head_dim: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.repeats


class Scope:
    """Hands out tensors by the order in which a program asks for them.

    Args:
        given: name -> tensor, of an earlier run; without it tensors are made.

    Attributes:
        made: name -> tensor as it was made, whatever the program wrote to it since.
        outputs: what the program returns besides its result.
    """

    def __init__(
        self,
        sizes: Sizes,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.made: dict[str, Tensor] = {}
        self.outputs: list[Tensor] = []
        self._given, self._seed = given, seed
        self._handed_out: dict[str, Tensor] = {}

    def weight(self, *shape: int) -> Tensor:
        """Return a fresh parameter: no gain is 1 and no bias 0, which would hide mistakes."""
        return self._tensor("weight", shape)

    def tied(self, *shape: int) -> Tensor:
        """Return the first parameter of that shape again; a fresh one if there is none."""
        for name, tensor in self._handed_out.items():
            if name.startswith("weight") and tensor.shape == shape and tensor.is_floating_point():
                return tensor
        return self.weight(*shape)

    def integers(self, *shape: int) -> Tensor:
        """Return a buffer of small integers."""
        return self._tensor("weight", shape, 7)

    def input(self, *shape: int) -> Tensor:
        """Return another input of the graph."""
        return self._tensor("input", shape)

    def ids(self, size: int, *shape: int) -> Tensor:
        """Return an input of integers below ``size``."""
        return self._tensor("ids", shape, size)

    def _tensor(self, kind: str, shape: tuple[int, ...], size: int | None = None) -> Tensor:
        name = f"{kind}_{len(self._handed_out)}"
        if self._given is None:
            self.made[name] = self._make(kind, shape, size)
        tensor = self.made[name].clone() if self._given is None else self._given[name]
        self._handed_out[name] = tensor
        return tensor

    def _make(self, kind: str, shape: tuple[int, ...], size: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self._seed + len(self.made))
        if size is not None:
            return torch.randint(size, shape, generator=generator)
        fan_in = shape[-1] if len(shape) > 1 and kind == "weight" else 1
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * fan_in**-0.5
        return noise.to(self.dtype)
