"""GemLite: Triton kernels for integer weights, 128 of a row to a scale and a zero point, next to 16 or 8-bit floats."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gemlite import helper
from torch import Tensor

from quarot_fx.bench.peers import Formats, Linear

GROUP = 128


def _prepare(weight: Tensor, processor: Any) -> Linear:
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).flatten(1)
    arguments = (codes, scale.flatten(1).to(weight.dtype), zero.flatten(1).to(weight.dtype))
    linear: Linear = processor(device=weight.device, dtype=weight.dtype).from_weights(*arguments)
    return linear


FORMATS: Formats = {
    "W4A16": (4, partial(_prepare, processor=helper.A16W4_HQQ_INT)),
    "W4A8 (float8)": (4, partial(_prepare, processor=helper.A8W4_HQQ_INT_dynamic)),
}
