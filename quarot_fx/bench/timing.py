"""Times on the GPU: medians of kernels in CUDA graphs, which have no gaps between launches, and of steps of a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = 256 * 2**20  # inputs rotate through this much, several times any L2 cache
CALLS = 4  # in a graph, at least
REPLAYS = 15
WARM_UPS = 5
STEPS = 30


def microseconds(call: Callable[[Any], object], variants: Sequence[Any]) -> float:
    """Return the time of one ``call(variant)``, the variants taken in turn, so that none is found in a cache."""
    for variant in variants[:2]:
        call(variant)
    torch.cuda.synchronize()
    calls = max(CALLS, len(variants))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(variants[index % len(variants)])
    graph.replay()
    return statistics.median(_elapsed(graph.replay, REPLAYS)) * 1000 / calls


def milliseconds(step: Callable[[], object]) -> float:
    """Return the time of one step, as the GPU sees it when the next is launched without waiting for it."""
    for _ in range(WARM_UPS):
        step()
    torch.cuda.synchronize()
    return statistics.median(_elapsed(step, STEPS))


def _elapsed(step: Callable[[], object], times: int) -> list[float]:
    """Return the milliseconds between two events around each of so many steps."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """Return as many tensors as exceed the caches, two at least."""
    first = make()
    return [first, *(make() for _ in range(number_of_copies(first.nbytes) - 1))]


def number_of_copies(nbytes: int) -> int:
    """Return how many times so many bytes exceed the caches, twice at least."""
    return 1 + max(1, CACHE_BYTES // nbytes)
