"""A model that gets its tokens in chunks, through a KV cache, as one that decodes does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch

from quarot_fx.cache.generation import generation_cache
from quarot_fx.cache.options import CacheOptions
from quarot_fx.cache.quarot_cache import QuarotCache
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig


def cache_options(options: Mapping[str, Any] | None) -> CacheOptions:
    """Return how a cache codes keys and values under the options of a setting; the float model's has 16 bits.

    Raises:
        OptionError: a cache cannot code them so.
    """
    if options is None:
        return CacheOptions(kv_bits=UNQUANTIZED_BITS)
    return CacheOptions.of_config(QuarotConfig.from_options(options))


class InChunks:
    """A model that is called with whole sequences, and gives them to another one some tokens at a time, with a cache.

    Args:
        runnable: what ``torch.compile`` returned, or the model itself.
        network: the model.
        cache: how keys and values are coded.
        length: of a chunk.
        room: tokens of the longest sequence.

    Attributes:
        cache: the last one that was used; ``None`` before the first call.
    """

    def __init__(self, runnable: Any, network: Any, cache: CacheOptions, length: int, room: int) -> None:
        self.runnable, self.network, self.options = runnable, network, cache
        self.length, self.room = length, room
        self.cache: QuarotCache | None = None
        self._takes_positions = "position_ids" in inspect.signature(network.forward).parameters

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        """Return an object with the ``logits`` of tokens int64 [n, length], as a model of transformers does.

        Args:
            input_ids: the tokens.
            use_cache: accepted, as the model does, and of no effect: there always is a cache.
            logits_to_keep: of so many tokens at the end; 0 is all.
        """
        batch, total = input_ids.shape
        self.cache = self._emptied(batch)
        first = total - logits_to_keep if logits_to_keep else 0
        logits = []
        for start in range(0, total, self.length):
            chunk = input_ids[:, start : start + self.length]
            positions = torch.arange(start, start + chunk.shape[1], device=chunk.device).expand_as(chunk)
            known = {"position_ids": positions} if self._takes_positions else {}
            out = self.runnable(input_ids=chunk, past_key_values=self.cache, use_cache=True, **known).logits
            if start + chunk.shape[1] > first:
                logits.append(out[:, max(first - start, 0) :])
        return SimpleNamespace(logits=torch.cat(logits, dim=1))

    @property
    def about(self) -> dict[str, Any]:
        """What the cache is, for JSON: how it codes, and its bytes."""
        k_bits, v_bits = (fmt.bits for fmt in self.options.formats())
        coded = {"k_bits": k_bits, "v_bits": v_bits, "chunk": self.length}
        if self.cache is None:
            return coded
        return {**coded, "bytes": self.cache.nbytes, "bytes_in_bfloat16": self.cache.dense_nbytes}

    def _emptied(self, batch: int) -> QuarotCache:
        if self.cache is None or self.cache.batch_size != batch:
            return generation_cache(self.network, self.room, batch, **asdict(self.options))
        self.cache.reset()
        return self.cache
