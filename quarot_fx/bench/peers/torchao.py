"""torchao: a linear layer whose weight is one of its tensors, compiled by Inductor as its documentation advises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    quantize_,
)

from quarot_fx.bench.peers import Formats, Linear


def _prepare(weight: Tensor, config: Callable[[], Any]) -> Linear:
    rows, columns = weight.shape
    module = nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(module, config())
    compiled = torch.compile(F.linear)
    return lambda x: compiled(x, module.weight)


FORMATS: Formats = {
    "W4A16": (4, partial(_prepare, config=partial(Int4WeightOnlyConfig, int4_packing_format="tile_packed_to_4d"))),
    "W8A8": (8, partial(_prepare, config=Int8DynamicActivationInt8WeightConfig)),
    "W8A8 (float8)": (
        8,
        partial(_prepare, config=partial(Float8DynamicActivationFloat8WeightConfig, granularity=PerRow())),
    ),
}
