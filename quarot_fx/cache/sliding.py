"""Layers that attend to a window of the last tokens, and store no more than it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quarot_fx.cache.formats import Format, Parts
from quarot_fx.cache.growing import GrowingLayer
from quarot_fx.cache.packed import TOKENS, PackedTensor, lasting_tensors
from quarot_fx.cache.static import StaticLayer, may_read
from quarot_fx.errors import CropError

REMEDY = "Make the cache without max_cache_len: then its windows keep what may be taken back"


class GrowingSlidingLayer(GrowingLayer):
    """The tokens that a window of the next one reaches, in their order: the last ``window - 1``.

    Attributes:
        window: number of tokens that a token attends to, itself among them.
        record_past: keep what leaves the window, until :meth:`crop` says that no token will be taken back.
    """

    is_sliding = True

    def __init__(self, key_format: Format, value_format: Format, where: str, window: int) -> None:
        super().__init__(key_format, value_format, where)
        self.window = window
        self.record_past = False

    @property
    def kind(self) -> str:
        """What the layer keeps, for a report."""
        return f"window of {self.window}, growing"

    @property
    def initial_capacity(self) -> int:
        """Nothing: what is stored is what has come."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of tokens that are stored at most."""
        return self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys so many queries will see, and the position of the first."""
        reached = min(self.length, self.window - 1)
        return reached + query_length, self.length - reached

    def activate_past_recording(self) -> None:
        """Keep what leaves the window from now on, so that tokens can be taken back."""
        self.record_past = True

    def _read(self, packed: PackedTensor) -> Tensor:
        return packed.read()

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[-2]
        visible, _ = self.get_mask_sizes(tokens)
        was_empty = self.length == 0
        self.length += tokens
        return (
            self._store_window(self.packed_keys, key_states, visible, was_empty),
            self._store_window(self.packed_values, value_states, visible, was_empty),
        )

    def _store_window(self, packed: PackedTensor, x: Tensor, visible: int, was_empty: bool) -> Tensor:
        quantized = packed.format.quantize(x)
        new = packed.format.pack(quantized)
        with lasting_tensors():
            packed.parts = tuple(torch.cat(pair, TOKENS) for pair in zip(packed.parts, new, strict=True))
        read = packed.format.dequantize(quantized, x.dtype) if was_empty else packed.decode(_last(packed, visible))
        if not self.record_past:
            self._keep(packed, self.window - 1)
        return read

    def _keep(self, packed: PackedTensor, tokens: int) -> None:
        with lasting_tensors():
            packed.parts = tuple(part.contiguous() for part in _last(packed, min(tokens, packed.capacity)))

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        for packed in self.packed:
            packed.parts = _last(packed, 0)

    def _crop(self, count: int, length: int) -> None:
        kept = length - count
        for packed in self.packed:
            if packed.parts and packed.capacity - count < min(kept, self.window - 1):
                remedy = "Call activate_past_recording() before the tokens come that may be taken back"
                raise CropError(tokens=count, where=self.where, reason=f"its window has moved on. {remedy}")
        self.length = kept
        for packed in self.packed:
            if packed.parts:
                packed.replace(lambda part: part[:, :, : part.shape[TOKENS] - count])
                self._keep(packed, self.window - 1)


class StaticSlidingLayer(StaticLayer):
    """A ring of ``window`` tokens: token number p stands at ``p mod window``.

    Attention reads them in their order, as masks are made for it. Which order that is follows from ``length``, a
    tensor: a ring that is being filled and one that is full run the same graph.
    """

    is_croppable = False

    def __init__(self, key_format: Format, value_format: Format, where: str, window: int) -> None:
        super().__init__(key_format, value_format, where, max_cache_len=window, is_sliding=True)
        self.window = window

    @property
    def kind(self) -> str:
        """What the layer keeps, for a report."""
        return f"window of {self.window}"

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Return how many keys so many queries will see, and the position of the first, a tensor in a graph."""
        if self.is_empty:
            return query_length, 0
        first = self._first_reached()
        return self.window - 1 + query_length, int(first) if may_read(first) else first

    def _first_reached(self) -> Tensor:
        """Position of the first token that the next one attends to."""
        return (self.length - (self.window - 1)).clamp(min=0)

    def activate_past_recording(self) -> None:
        """Refuse: new tokens take the place of old ones."""
        raise CropError(tokens="any", where=self.where, reason=f"new tokens take the place of old ones. {REMEDY}")

    def _read(self, packed: PackedTensor) -> Tensor:
        length = int(self.get_seq_length())
        position = torch.arange(max(length - self.window, 0), length, device=self.device) % self.window
        return packed.decode(tuple(part.index_select(TOKENS, position) for part in packed.parts))

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[-2]
        position = torch.arange(self.window - 1 + tokens, device=self.device) + self._first_reached()
        order = position % self.window
        if tokens > 1:  # then what is visible may be more than the window: new tokens follow upon the ring
            order = torch.where(position < self.length, order, self.window + position - self.length)
            order = order.clamp(max=self.window + tokens - 1)  # past the last token nothing attends
        stored = min(tokens, self.window)
        ring = (torch.arange(tokens - stored, tokens, device=self.device) + self.length) % self.window
        was_empty, self.is_empty = self.is_empty, False
        self.length.add_(tokens)
        return (
            self._store_window(self.packed_keys, key_states, order, ring, was_empty),
            self._store_window(self.packed_values, value_states, order, ring, was_empty),
        )

    def _store_window(self, packed: PackedTensor, x: Tensor, order: Tensor, ring: Tensor, was_empty: bool) -> Tensor:
        quantized = packed.format.quantize(x)
        read_from = packed.parts
        if x.shape[TOKENS] > 1 and not was_empty:
            new = packed.format.pack(quantized)
            read_from = tuple(torch.cat(pair, TOKENS) for pair in zip(packed.parts, new, strict=True))
        packed.write(tuple(part[:, :, -ring.shape[0] :] for part in quantized), ring)
        if was_empty:
            return packed.format.dequantize(quantized, x.dtype)
        return packed.decode(tuple(part.index_select(TOKENS, order) for part in read_from))

    def _crop(self, count: int, length: int) -> None:
        if length > self.window and count:
            raise CropError(tokens=count, where=self.where, reason=f"new tokens took the place of old ones. {REMEDY}")
        super()._crop(count, length)


def _last(packed: PackedTensor, tokens: int) -> Parts:
    """What is stored of the last tokens."""
    return tuple(part.narrow(TOKENS, part.shape[TOKENS] - tokens, tokens) for part in packed.parts)
