"""The smallest cache that holds rotated codes: what the graphs of such caches look like, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, StaticLayer

from quarot_fx import ops  # noqa: F401  registers torch.ops.quarot

quarot = torch.ops.quarot


class CodeLayer(StaticLayer):
    """Keys and values of one layer as packed codes, a scale and a zero point for each token and head."""

    def __init__(self, capacity: int, bits: int, rotation: str) -> None:
        super().__init__(capacity)
        self.bits, self.rotation = bits, rotation
        self.is_empty = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.stores = [self._store(states) for states in (key_states, value_states)]
        self.is_initialized = True

    def _store(self, states: Tensor) -> list[Tensor]:
        batch, heads, _, size = states.shape
        scales = torch.promote_types(states.dtype, torch.float32)
        rows = ((size * self.bits + 7) // 8, torch.uint8), (1, scales), (1, torch.uint8)
        return [torch.zeros(batch, heads, self.max_cache_len, width, dtype=dtype) for width, dtype in rows]

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> list[Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        position = torch.arange(tokens) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        states = (key_states, value_states)
        return [self._through(x, store, position) for x, store in zip(states, self.stores, strict=True)]

    def _through(self, x: Tensor, store: list[Tensor], position: Tensor) -> Tensor:
        size = x.shape[-1]
        parts = quarot.quantize_asymmetric(self._rotated(x), self.bits, None, 0.95)
        for held, new in zip(store, (quarot.pack(parts[0], self.bits), *parts[1:]), strict=True):
            held.index_copy_(2, position, new)
        if not self.is_empty:
            parts = (quarot.unpack(store[0], self.bits, size, False), *store[1:])
        return self._rotated(quarot.dequantize(*parts, x.dtype), inverse=True)

    def _rotated(self, x: Tensor, inverse: bool = False) -> Tensor:
        return x if self.rotation == "none" else quarot.rotate(x, f"{self.rotation}-{x.shape[-1]}", inverse=inverse)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length, 0) if self.is_empty and query_length > 1 else (self.max_cache_len, 0)


def code_cache(config: PretrainedConfig, capacity: int = 16, bits: int = 4, rotation: str = "hadamard") -> Cache:
    """An empty cache; :func:`filled` says that it is no longer."""
    return Cache(layers=[CodeLayer(capacity, bits, rotation) for _ in range(config.num_hidden_layers)])


def filled(cache: Cache) -> Cache:
    """Say that tokens are in the cache, on which graphs are guarded."""
    for layer in cache.layers:
        layer.is_empty = False
    return cache
