"""Norms, in every spelling that models use."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Norm

Gain = Literal["g", "none", "1 + g", "g after a cast"]


def _gained(m: Scope, x: Tensor, gain: Gain) -> Tensor:
    if gain == "none":
        return x
    g = m.weight(x.shape[-1])
    return x * (1 + g) if gain == "1 + g" else (g * x.to(m.dtype)) if gain == "g after a cast" else g * x


@production(Norm, weight=2)
def rms_norm(
    m: Scope,
    x: Tensor,
    *,
    gain: Gain,
    square: Literal["pow", "x * x", "square", "sum", "length"],
    scale: Literal["rsqrt", "sqrt", "pow"],
    wide: bool,
) -> Tensor:
    """Written out."""
    dtype, x = x.dtype, x.float() if wide else x
    if square == "length":
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1]
    elif square == "sum":
        mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    else:
        squares = x.pow(2) if square == "pow" else x.square() if square == "square" else x * x
        mean = squares.mean(-1, keepdim=True)
    mean = mean + 1e-3
    y = x * mean.rsqrt() if scale == "rsqrt" else x / mean.sqrt() if scale == "sqrt" else x * mean.pow(-0.5)
    return _gained(m, y if gain == "g after a cast" else y.to(dtype), gain).to(dtype)


@production(Norm)
def fused_rms_norm(m: Scope, x: Tensor, *, gain: bool) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], m.weight(x.shape[-1]) if gain else None, 1e-3)


@production(Norm)
def fused_layer_norm(m: Scope, x: Tensor, *, gain: bool, bias: bool) -> Tensor:
    g, b = (m.weight(x.shape[-1]) if given else None for given in (gain, bias))
    return F.layer_norm(x, x.shape[-1:], g, b, 1e-3)


@production(Norm, weight=2)
def layer_norm(m: Scope, x: Tensor, *, gain: Gain, variance: Literal["pow", "var"], bias: bool, wide: bool) -> Tensor:
    """Written out."""
    dtype, x = x.dtype, x.float() if wide else x
    x = x - x.mean(-1, keepdim=True)
    mean = x.pow(2).mean(-1, keepdim=True) if variance == "pow" else x.var(-1, keepdim=True, unbiased=False)
    y = _gained(m, x * torch.rsqrt(mean + 1e-3), gain)
    return (y + m.weight(x.shape[-1]) if bias else y).to(dtype)


@production(Norm)
def norm_over_two_axes(m: Scope, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-2:], m.weight(*x.shape[-2:]), None, 1e-3)


@production(Norm)
def absolute_norm(m: Scope, x: Tensor) -> Tensor:
    """Divides by the sum of magnitudes, which is no length."""
    return x / (torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True) + 1)


@production(Norm)
def norm_over_tokens(m: Scope, x: Tensor) -> Tensor:
    """Looks like RMSNorm, along the wrong axis."""
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-3) * m.weight(x.shape[-1])
