"""A layer that makes room as tokens come."""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.cache.formats import Format
from quarot_fx.cache.layer import PackedLayer
from quarot_fx.cache.packed import PackedTensor, lasting_tensors

PAGE = 256  # tokens


class GrowingLayer(PackedLayer):
    """Room grows by whole pages, so that few tokens make what is stored be copied.

    Attributes:
        length: number of tokens stored.
    """

    is_croppable = True

    def __init__(self, key_format: Format, value_format: Format, where: str) -> None:
        super().__init__(key_format, value_format, where)
        self.length = 0

    @property
    def kind(self) -> str:
        """What the layer keeps, for a report."""
        return "growing"

    @property
    def initial_capacity(self) -> int:
        """One page."""
        return PAGE

    def get_seq_length(self) -> int:
        """Return the number of tokens stored."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys so many queries will see, and the position of the first."""
        return self.length + query_length, 0

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = self.length, self.length + key_states.shape[-2]
        self.length = stop
        position = torch.arange(start, stop, device=self.device)
        return (
            self._store(self.packed_keys, key_states, position, start, stop),
            self._store(self.packed_values, value_states, position, start, stop),
        )

    def _store(self, packed: PackedTensor, x: Tensor, position: Tensor, start: int, stop: int) -> Tensor:
        quantized = packed.format.quantize(x)
        if stop > packed.capacity:
            with lasting_tensors():
                packed.reserve(-(-stop // PAGE) * PAGE)
        packed.write(quantized, position)
        return packed.format.dequantize(quantized, x.dtype) if start == 0 else packed.read(stop)

    def reset(self) -> None:
        """Forget all tokens, and keep the room."""
        super().reset()
        self.length = 0

    def _crop(self, count: int, length: int) -> None:
        self.length = length - count
