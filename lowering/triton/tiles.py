"""Tile sizes and launch parameters: measured ones, shipped as tables, of the nearest shape on the nearest device.

A table is ``tables/sm_<capability>.json``: for each kernel a list of shapes with the launch parameters that were
fastest there, and the shared memory that a program may need for them. Nothing here measures or compiles, so that it may
run while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import torch

from quarot_fx.lowering.triton.device import Device, describe

Launch = Mapping[str, Any]


def nearest(kernel: str, device: torch.device, **sizes: int) -> Launch:
    """Return the launch parameters of a kernel for the nearest measured sizes, by the sum of |log ratios|."""
    return _nearest(kernel, describe(device), tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _nearest(kernel: str, device: Device, sizes: tuple[tuple[str, int], ...]) -> Launch:
    def distance(entry: Mapping[str, Any]) -> float:
        return sum(abs(math.log(size / entry[name])) for name, size in sizes)

    best: Launch = min(table(device)[kernel], key=distance)["launch"]
    return best


@lru_cache
def table(device: Device) -> Mapping[str, Any]:
    """Return each kernel's table of the newest architecture that the device can follow; the oldest has every kernel."""
    tables = {}
    for file in (resources.files(__package__) / "tables").iterdir():
        name, _, extension = file.name.partition(".")
        if extension == "json":
            tables[int(name.removeprefix("sm_"))] = json.loads(file.read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for architecture in sorted(tables):
        needed = tables[architecture].pop("shared_bytes")
        if architecture <= 10 * device.capability[0] + device.capability[1] and needed <= device.shared_bytes:
            merged |= tables[architecture]
    return merged
