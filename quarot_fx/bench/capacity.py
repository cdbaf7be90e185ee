"""How much context fits into a GPU: bytes of weights and caches, and the largest cache that a model decodes with.

The cache is that of the whole model. The step is one of a few layers, beside as many bytes as the weights of the others
take: what a layer needs while it runs is free before the next. Graphs run node by node; the bfloat16 model, as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from quarot_fx.bench.memory import Memory
from quarot_fx.bench.models import (
    BFLOAT16,
    FEW_LAYERS,
    MORE_LAYERS,
    OPTIONS,
    STEPS_IN_CACHE,
    Compile,
    Workload,
    forgotten,
    random_cache,
    random_model,
)
from quarot_fx.bench.record import MemoryUse
from quarot_fx.bench.shapes import DecoderShape

SEQUENCES = 16
TOKENS = tuple(2**n for n in range(11, 18))
GROUP = 128  # tokens that room is made for at a time
FIRST = 2048  # tokens of the step that compiles, while weights are not packed yet
SPARE = 2**28  # bytes that allocators and libraries keep for themselves
LESS, TRIES = 0.97, 8  # what is tried after a size that does not fit


@dataclass(frozen=True)
class Way:
    """How a model is run: by what, and with a cache of how many bits."""

    backend: str
    cache_bits: int
    compile_model: Compile


UNCOMPILED = Way("bfloat16", BFLOAT16, lambda model: model)


def ways(options: Mapping[str, Any], cache_bits: int) -> list[Way]:
    """Return the model compiled by quarot, with ``options``, and in bfloat16."""
    by_quarot = partial(
        torch.compile, backend="quarot", options={"nested_backend": "eager", **OPTIONS, **options}, dynamic=False
    )
    return [Way("quarot", cache_bits, by_quarot), UNCOMPILED]


def measure_capacity(name: str, shape: DecoderShape, way: Way, sequences: int, device: str) -> Iterator[MemoryUse]:
    """Compute what caches of several lengths take, and find the largest that a step can be run with."""
    blank = MemoryUse(name, way.backend, way.cache_bits, sequences, FIRST)
    a_token = token_bytes(shape, way.cache_bits) * sequences
    with torch.no_grad():
        with forgotten():  # libraries take workspaces at a first call and keep them: no weights of a model
            _FewLayers(shape, FEW_LAYERS, UNCOMPILED, device).step(blank)
        with forgotten():
            few = _FewLayers(shape, FEW_LAYERS, way, device).step(blank).weight_bytes
        with forgotten():
            free = _free(device)
            layers = _FewLayers(shape, MORE_LAYERS, way, device)
            first = layers.step(blank)
            if few is None or first.weight_bytes is None or first.peak_bytes is None:
                yield replace(first, reason=first.reason or "memory is not counted on this device")
                return
            layers.others = (first.weight_bytes - few) // (MORE_LAYERS - FEW_LAYERS) * (shape.layers - MORE_LAYERS)
            weights = first.weight_bytes + layers.others
            working = first.peak_bytes - first.weight_bytes - a_token * FIRST
            for tokens in TOKENS:
                yield replace(blank, tokens=tokens, weight_bytes=weights, cache_bytes=a_token * tokens)
            room = (free - SPARE - weights - working) // a_token
            for _ in range(TRIES if room >= GROUP else 0):
                found = layers.step(replace(blank, tokens=room // GROUP * GROUP, weight_bytes=weights))
                yield found
                if found.reason is None:
                    return
                room = int(room * LESS)


def token_bytes(shape: DecoderShape, cache_bits: int) -> int:
    """Return the bytes that one more token of one sequence takes in a cache."""
    workload = Workload(GROUP - STEPS_IN_CACHE, cache_bits=cache_bits, device="cpu")
    return random_cache(shape.config(shape.layers, GROUP), workload)[1] // GROUP


class _FewLayers:
    """Some layers of a model.

    Attributes:
        others: bytes to hold beside them, as the weights of the other layers.
    """

    def __init__(self, shape: DecoderShape, layers: int, way: Way, device: str) -> None:
        self.memory, self.device, self.others = Memory(device), device, 0
        model = random_model(shape, layers, Workload(max(TOKENS), device=device))
        self.config = shape.config(shape.layers, positions=max(TOKENS))
        self.run: Callable[..., Any] = way.compile_model(model)

    def step(self, blank: MemoryUse) -> MemoryUse:
        """Make a cache that is as good as full, and run a step twice, since the first may compile."""
        try:
            return self._step(blank)
        except torch.OutOfMemoryError as error:
            return replace(blank, reason=f"{type(error).__name__}: {str(error).splitlines()[0]}")
        finally:
            gc.collect()
            if torch.device(self.device).type == "cuda":
                torch.cuda.empty_cache()

    def _step(self, blank: MemoryUse) -> MemoryUse:
        others = torch.empty(self.others, dtype=torch.uint8, device=self.device)
        before = self.memory.held()
        workload = Workload(blank.tokens - STEPS_IN_CACHE, blank.sequences, blank.cache_bits, device=self.device)
        cache, cache_bytes = random_cache(self.config, workload)
        with_cache = self.memory.held()
        ids = torch.randint(self.config.vocab_size, (blank.sequences, 1), device=self.device)
        for _ in range(2):
            self.memory.peak()
            self.run(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        held, peak = self.memory.held(), self.memory.peak()
        del others
        if before is None or with_cache is None or held is None:
            return replace(blank, cache_bytes=cache_bytes)
        return replace(
            blank, weight_bytes=held - cache_bytes, cache_bytes=cache_bytes, allocated_bytes=with_cache - before,
            peak_bytes=peak,
        )  # fmt: skip


def _free(device: str) -> int:
    """Return the bytes of a GPU that nobody has; 0 elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else 0
