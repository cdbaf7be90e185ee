"""PyTorch's own float8 product with a scale a row: ``torch._scaled_mm``, and a quantisation that Inductor fuses."""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.bench.peers import Formats, Linear

FLOAT8 = torch.float8_e4m3fn


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return (x.float() / scale).to(FLOAT8), scale


def _prepare(weight: Tensor) -> Linear:
    codes, scale = _quantize(weight)
    quantize = torch.compile(_quantize)

    def linear(x: Tensor) -> Tensor:
        x_codes, x_scale = quantize(x)
        scales = {"scale_a": x_scale, "scale_b": scale.T}
        return torch._scaled_mm(x_codes, codes.T, **scales, out_dtype=x.dtype, use_fast_accum=True)

    return linear


FORMATS: Formats = {"W8A8": (8, _prepare)}
