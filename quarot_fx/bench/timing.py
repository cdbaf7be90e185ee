"""Time of a kernel on the GPU: the median over replays of a CUDA graph, which has no gaps between launches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = 256 * 2**20  # inputs rotate through this much, several times any L2 cache
CALLS = 4  # in a graph, at least
REPLAYS = 15


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
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """Return as many tensors as exceed the caches, two at least."""
    first = make()
    return [first, *(make() for _ in range(max(1, CACHE_BYTES // first.nbytes)))]
