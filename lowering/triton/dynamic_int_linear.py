"""``quarot::dynamic_int_linear`` of one token by ``int_gemv``, each of whose programs quantises the token for itself."""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.int_gemv import launch_gemv


def dynamic_int_linear(
    x: Tensor,
    gain: Tensor | None,
    eps: float | None,
    bits: int,
    clip: float,
    weight: Tensor,
    weight_scale: Tensor,
    weight_bits: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    activation: str | None,
) -> Tensor:
    """Return what the op declares."""
    size, rows = x.shape[-1], weight.shape[0]
    y = x.new_empty((*x.shape[:-1], rows if activation is None else rows // 2), dtype=dtype)
    if y.numel():
        launch = tiles.nearest("dynamic_int_gemv", x.device, tokens=1, rows=rows, columns=size)
        gain, bias, residual = (None if one is None else one.contiguous() for one in (gain, bias, residual))
        launch_gemv(
            x.contiguous(), size, gain, None, None, None, weight, weight_bits, weight_scale.contiguous(), None, None,
            bias, residual, y, activation=activation, launch=launch, eps=eps, bits=bits, clip=clip,
        )  # fmt: skip
    return y
