"""``quarot::quantize_weight``: a weight as integer codes with scales, once; ``fold-constants`` stores the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.errors import NotCalibratedError
from quarot_fx.ops.affine import WEIGHT_SCALE, encode, weight_scale_and_zero
from quarot_fx.ops.clip_search import search_clip
from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.quantize_asymmetric import quantize_asymmetric
from quarot_fx.ops.quantize_symmetric import quantize_symmetric

Codes = tuple[Tensor, Tensor, Tensor]


def _reference(
    weight: Tensor,
    bits: int,
    group: int | None,
    clip: float | None,
    symmetric: bool,
    rounding: str = "nearest",
    error: str = "weight",
) -> Codes:
    """Return codes [..., n], bfloat16 scale and zero point [..., n / group] of a weight [..., n], rounded to nearest.

    Codes are int8 with no zero points, an empty tensor, or uint8 with zero points in uint8. All is computed in float32,
    from scales as they are stored. ``clip=None`` finds the ratio with the least error of the weight, for every group.
    Any other rounding, and the ratio with the least error of the output, follow from more than the weight: such codes
    are looked up where calibration left them, see ``quarot_fx.calibration.calibrated``.
    """
    if (rounding, error) != ("nearest", "weight"):
        raise NotCalibratedError(parameter="of this op", how=options_by_calibration(rounding, error))
    weight = weight.detach().float()
    ratio = search_clip(weight, bits, group, symmetric) if clip is None else clip
    scale, zero = weight_scale_and_zero(weight, bits, group, ratio, symmetric)
    codes = encode(weight, scale, zero, bits)
    return codes.contiguous(), scale.contiguous(), _no_zero(weight) if zero is None else zero.contiguous()


def options_by_calibration(rounding: str = "nearest", error: str = "weight") -> str:
    """Return the options that take calibration, by their names and values; nothing if the weight is enough."""
    named = [f"w_rounding={rounding!r}"] if rounding != "nearest" else []
    return " and ".join([*named, f"w_clip={error!r}"] if error != "weight" else named)


def _no_zero(weight: Tensor) -> Tensor:
    return weight.new_empty(0, dtype=torch.uint8)


def _fake(
    weight: Tensor,
    bits: int,
    group: int | None,
    clip: float | None,
    symmetric: bool,
    rounding: str = "nearest",
    error: str = "weight",
) -> Codes:
    quantize = quantize_symmetric if symmetric else quantize_asymmetric
    codes, scale, *zero = quantize(weight.float(), bits, group)
    return codes, scale.to(WEIGHT_SCALE), zero[0] if zero else _no_zero(weight)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    weight = torch.randn(6, 48, generator=generator)
    for symmetric in (True, False):
        for bits, group, clip in ((4, None, None), (2, 16, None), (8, 48, 1.0), (3, 24, 0.9)):
            yield weight, bits, group, clip, symmetric
        yield weight.bfloat16(), 4, None, None, symmetric
        yield torch.randn(2, 48, 5, generator=generator).mT, 4, 16, None, symmetric  # experts, transposed
        yield torch.zeros(3, 16), 4, None, None, symmetric
        yield weight[:0], 4, None, 1.0, symmetric


quantize_weight = declare(
    OpDeclaration(
        schema="quantize_weight(Tensor weight, int bits, int? group, float? clip, bool symmetric,"
        " str rounding='nearest', str error='weight') -> (Tensor codes, Tensor scale, Tensor zero)",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        is_traceable=False,  # it searches in threads
        tolerance={torch.float32: 1e-6},
    )
)
