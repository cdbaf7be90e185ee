"""A layer with room for a given number of tokens, made once: what compiled graphs and CUDA graphs need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quarot_fx.cache.formats import Format
from quarot_fx.cache.layer import PackedLayer
from quarot_fx.cache.packed import PackedTensor, lasting_tensors
from quarot_fx.errors import CacheFullError, OffloadError


class StaticLayer(PackedLayer):
    """Tensors that keep their shapes and addresses.

    Attributes:
        is_empty: nothing was stored since the beginning or the last reset. A compiled graph is guarded by it: there
            is one graph for a prompt, which attends to fresh keys and values alone, and one for what follows.
        length: number of tokens stored, int64 []: a tensor, since a number would be part of the graph.
    """

    is_compileable = True
    is_croppable = True

    def __init__(
        self, key_format: Format, value_format: Format, where: str, max_cache_len: int, is_sliding: bool = False
    ) -> None:
        super().__init__(key_format, value_format, where)
        self.max_cache_len = max_cache_len
        self.is_sliding = is_sliding  # attends to a window, which is at least as long as max_cache_len
        self.is_empty = True
        self.length = torch.zeros((), dtype=torch.int64)

    @property
    def kind(self) -> str:
        """What the layer keeps, for a report."""
        return f"{self.initial_capacity} tokens"

    @property
    def initial_capacity(self) -> int:
        """Number of tokens that there is room for."""
        return self.max_cache_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make all tensors, for keys and values like these, [batch, heads, any, size], and fix their addresses."""
        super().lazy_initialization(key_states, value_states)
        with lasting_tensors():
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        self._fix_addresses()

    def _fix_addresses(self) -> None:
        if torch.compiler.is_compiling():  # Dynamo cannot trace it; a cache that was made early never gets here
            return
        for tensor in (self.length, *self.packed_keys.parts, *self.packed_values.parts):
            torch._dynamo.mark_static_address(tensor)

    def get_seq_length(self) -> Any:
        """Return the number of tokens stored: 0, known when a graph is compiled, or a tensor int64 []."""
        return 0 if self.is_empty else self.length

    def get_max_length(self) -> int:
        """Return the number of tokens that there is room for."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys so many queries will see, and the position of the first: all, or a prompt its own.

        Raises:
            CacheFullError: there is no room for so many tokens.
        """
        if self.is_empty:
            self._check_room(query_length, 0)
            return query_length, 0
        if may_read(self.length):
            self._check_room(query_length, int(self.length))
        return self.max_cache_len, 0

    def _check_room(self, tokens: int, length: int) -> None:
        if length + tokens > self.max_cache_len:
            raise CacheFullError(
                where=self.where, length=length, capacity=self.max_cache_len, tokens=tokens, needed=length + tokens
            )

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[-2]
        # On other devices reading the length waits for them: get_mask_sizes does it, once for all layers.
        is_known = self.device.type == "cpu" and not self.is_empty and may_read(self.length)
        self._check_room(tokens, int(self.length) if is_known else 0)
        position = torch.arange(tokens, device=self.device) + self.length
        was_empty, self.is_empty = self.is_empty, False
        self.length.add_(tokens)
        return (
            self._store(self.packed_keys, key_states, position, was_empty),
            self._store(self.packed_values, value_states, position, was_empty),
        )

    def _store(self, packed: PackedTensor, x: Tensor, position: Tensor, was_empty: bool) -> Tensor:
        quantized = packed.format.quantize(x)
        packed.write(quantized, position)
        return packed.format.dequantize(quantized, x.dtype) if was_empty else packed.read()

    def reset(self) -> None:
        """Forget all tokens. Tensors stay where they are."""
        super().reset()
        self.is_empty = True
        self.length.zero_()

    def _crop(self, count: int, length: int) -> None:
        if count == 0:
            return
        self.length.sub_(count)
        self.is_empty = count == length
        position = torch.arange(length - count, length, device=self.device)
        for packed in self.packed:
            packed.clear(position)  # attention still reads there, with weight 0, which hides all but NaN

    def _change_batch(self, change: Any) -> None:
        super()._change_batch(change)
        if self.is_initialized:
            self._fix_addresses()

    def offload(self) -> None:
        """Refuse: the tensors would lose their addresses."""
        raise OffloadError(where=self.where)

    def prefetch(self) -> None:
        """Do nothing: the tensors are where they belong."""


def may_read(tensor: Tensor) -> bool:
    """Whether a tensor's value may become a number now: not while a graph is traced or recorded."""
    if torch.compiler.is_compiling():  # first: to ask for the stream would break the graph
        return False
    return not (tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
