"""Affine quantisation in plain PyTorch: x is about (code - zero) * scale, for groups of the last axis.

The ``quarot::`` ops, the clip search and the weight quantisers share these functions. Scales are float32, or
float64 where x is. A group with a value that is not finite has such a scale, so that decoding shows it. Nothing is
written in place: a compiler takes these functions in the place of the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.errors import GroupSizeError, OptionError


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest code.

    Raises:
        OptionError: bits is not 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise OptionError(name="bits", value=bits, reason="must be 2 to 8")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def group_count(x: Tensor, group: int | None) -> int:
    """Return how many groups the last axis has; ``None`` means one.

    Raises:
        GroupSizeError: the group does not divide the axis.
    """
    size = x.shape[-1]
    if group is None:
        return 1
    if group < 1 or size % group:
        raise GroupSizeError(option="group", group=group, size=size, where="the tensor")
    return size // group


def split_groups(x: Tensor, count: int) -> Tensor:
    """View [..., n] as [..., count, n / count]."""
    return x.unflatten(-1, (count, x.shape[-1] // count))


def symmetric_scale(x: Tensor, bits: int, group: int | None = None, clip: float | Tensor = 1.0) -> Tensor:
    """Return the scale [..., n / group] that maps the fraction ``clip`` of max|x| to the largest code."""
    _, highest = code_range(bits, signed=True)
    groups = split_groups(x, group_count(x, group))
    largest = groups.abs().amax(-1).to(torch.promote_types(x.dtype, torch.float32))
    return _one_where_zero(largest * clip / highest)


def asymmetric_scale(
    x: Tensor, bits: int, group: int | None = None, clip: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (uint8), [..., n / group], that map ``clip`` of x's range to all codes.

    The range always includes 0, which is thus exact: padding and masked values stay 0.
    """
    _, highest = code_range(bits, signed=False)
    groups = split_groups(x, group_count(x, group)).to(torch.promote_types(x.dtype, torch.float32))
    smallest, largest = groups.amin(-1).clamp(max=0) * clip, groups.amax(-1).clamp(min=0) * clip
    scale = _one_where_zero((largest - smallest) / highest)
    return scale, _to_code((-smallest / scale).round(), 0, highest, torch.uint8)


def scale_and_zero(
    x: Tensor, bits: int, group: int | None, clip: float | Tensor, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the scale, and the zero point where codes are not symmetric."""
    if symmetric:
        return symmetric_scale(x, bits, group, clip), None
    return asymmetric_scale(x, bits, group, clip)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Round x [..., n] to codes [..., n]: int8, or uint8 where there is a zero point."""
    lowest, highest = code_range(bits, signed=zero is None)
    codes = (split_groups(x, scale.shape[-1]).to(scale.dtype) / scale[..., None]).round()
    if zero is not None:
        codes = codes + zero[..., None]
    return _to_code(codes, lowest, highest, torch.int8 if zero is None else torch.uint8).flatten(-2)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (codes - zero) * scale in a dtype; the groups follow from the shapes."""
    values = split_groups(codes, scale.shape[-1]).to(scale.dtype)
    if zero is not None:
        values = values - zero[..., None]
    return (values * scale[..., None]).to(dtype).flatten(-2)


def _one_where_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


def _to_code(values: Tensor, lowest: int, highest: int, dtype: torch.dtype) -> Tensor:
    return values.nan_to_num(nan=0).clamp(lowest, highest).to(dtype)
