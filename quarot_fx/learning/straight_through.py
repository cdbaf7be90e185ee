"""Quantisation with a gradient: rounding lets it pass as if it were not there (Bengio et al. 2013, arXiv 1308.3432)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quarot_fx.config import QuantScheme
from quarot_fx.ops.affine import asymmetric_scale, code_range, group_count, split_groups, symmetric_scale


def quantize_straight_through(x: Tensor, scheme: QuantScheme) -> Tensor:
    """Return x [..., n], rounded to codes and back as ``quarot::quantize_symmetric`` and its kind do it.

    The gradient is that of the range, too: what is clipped pulls at the values that decide on the scale. On a GPU all
    steps are one kernel, and so is their gradient.
    """
    return (_compiled() if x.is_cuda else _quantize)(x, scheme)


@cache
def _compiled() -> Callable[[Tensor, QuantScheme], Tensor]:
    return torch.compile(_quantize, dynamic=False)


def _quantize(x: Tensor, scheme: QuantScheme) -> Tensor:
    assert isinstance(scheme.clip, float | int), "activations have one clip ratio"
    zero: Tensor | int = 0
    if scheme.symmetric:
        scale = symmetric_scale(x, scheme.bits, scheme.group, scheme.clip)
    else:
        scale, zeros = asymmetric_scale(x, scheme.bits, scheme.group, scheme.clip)
        zero = zeros[..., None].to(scale.dtype)
    lowest, highest = code_range(scheme.bits, signed=scheme.symmetric)
    exact = split_groups(x, group_count(x, scheme.group)).to(scale.dtype) / scale[..., None]
    codes = (pass_through(exact, exact.round()) + zero).clamp(lowest, highest)
    return ((codes - zero) * scale[..., None]).flatten(-2).to(x.dtype)


def pass_through(x: Tensor, value: Tensor) -> Tensor:
    """Return a value, with the gradient of x."""
    return x + (value - x).detach()
