"""Affine quantisation in plain PyTorch: x is about (code - zero) * scale, for groups of the last axis.

The ``quarot::`` ops, the clip search and the weight quantisers share these functions. Scales are float32, or
float64 where x is; those of weights, which are stored, are bfloat16. A group with a value that is not finite has such a
scale, so that decoding shows it. Nothing is written in place: a compiler takes these functions in the place of the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.errors import GroupSizeError, OptionError

# Of a weight's scales. Codes are found with the rounded scale, so that it only has to be close to the best one; and no
# scale is too small or too large for this dtype, as some are for float16.
WEIGHT_SCALE = torch.bfloat16


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


def symmetric_scale(
    x: Tensor, bits: int, group: int | None = None, clip: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the scale [..., n / group] that maps the fraction ``clip`` of max|x| to the largest code, rounded to a
    dtype if one is given.
    """
    _, highest = code_range(bits, signed=True)
    groups = split_groups(x, group_count(x, group))
    largest = groups.abs().amax(-1).to(torch.promote_types(x.dtype, torch.float32))
    return _as_scale(largest * clip / highest, dtype)


def asymmetric_scale(
    x: Tensor, bits: int, group: int | None = None, clip: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (uint8), [..., n / group], that map ``clip`` of x's range to all codes; the scale
    rounded to a dtype if one is given.

    The range always includes 0, which is thus exact: padding and masked values stay 0.
    """
    _, highest = code_range(bits, signed=False)
    groups = split_groups(x, group_count(x, group)).to(torch.promote_types(x.dtype, torch.float32))
    smallest, largest = groups.amin(-1).clamp(max=0) * clip, groups.amax(-1).clamp(min=0) * clip
    scale = _as_scale((largest - smallest) / highest, dtype)
    return scale, _to_code((-smallest / scale).round(), 0, highest, torch.uint8)


def weight_scale_and_zero(
    weight: Tensor, bits: int, group: int | None, clip: float | Tensor, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Return a weight's scale as it is stored, and the zero point where codes are not symmetric."""
    if symmetric:
        return symmetric_scale(weight, bits, group, clip, WEIGHT_SCALE), None
    return asymmetric_scale(weight, bits, group, clip, WEIGHT_SCALE)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Round x [..., n] to codes [..., n]: int8, or uint8 where there is a zero point."""
    lowest, highest = code_range(bits, signed=zero is None)
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    codes = (split_groups(x, scale.shape[-1]).to(dtype) / scale[..., None]).round()
    if zero is not None:
        codes = codes + zero[..., None]
    return _to_code(codes, lowest, highest, torch.int8 if zero is None else torch.uint8).flatten(-2)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (codes - zero) * scale in a dtype; the groups follow from the shapes."""
    values = split_groups(codes, scale.shape[-1]).to(torch.promote_types(scale.dtype, torch.float32))
    if zero is not None:
        values = values - zero[..., None]
    return (values * scale[..., None]).to(dtype).flatten(-2)


def _as_scale(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a scale in a dtype, if one is given, and 1 where it is 0 then."""
    scale = scale if dtype is None else scale.to(dtype)
    return torch.where(scale == 0, 1, scale)


def _to_code(values: Tensor, lowest: int, highest: int, dtype: torch.dtype) -> Tensor:
    return values.nan_to_num(nan=0).clamp(lowest, highest).to(dtype)
