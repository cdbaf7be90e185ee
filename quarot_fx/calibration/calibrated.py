"""Codes that calibration found, kept as long as the weights that they were made of, for every graph that is compiled.

An entry is known by how the weight was made, as in :mod:`quarot_fx.store`: the same rotations, the same scheme, the
same content of the same parameters. Anything else was not calibrated.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from quarot_fx.errors import NotCalibratedError
from quarot_fx.graph import parameters_of
from quarot_fx.ops.quantize_weight import options_by_calibration
from quarot_fx.store import expression


@dataclass(frozen=True)
class PackedCodes:
    """A weight as codes, on the CPU.

    Attributes:
        packed: uint8 [..., rows, bytes], as ``quarot::pack`` makes it.
        scale, zero: bfloat16 and uint8 [..., rows, groups]; zero points are an empty tensor if codes are symmetric.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor


_CALIBRATED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> key of an expression -> PackedCodes


def remember(quantization: fx.Node, codes: PackedCodes) -> None:
    """Keep the codes that a ``quarot::quantize_weight`` node stands for."""
    made = expression(quantization)
    _CALIBRATED.setdefault(made.leaves[0], {})[made.key] = codes


def forget(quantization: fx.Node) -> None:
    """Let go of the codes that a ``quarot::quantize_weight`` node stands for, if there are any."""
    made = expression(quantization)
    _CALIBRATED.get(made.leaves[0], {}).pop(made.key, None)


def calibrated_by(quantization: fx.Node) -> str:
    """Return the options by which a ``quarot::quantize_weight`` node depends on calibration; nothing if it does not."""
    _, _, _, _, _, *rounding = quantization.args
    return options_by_calibration(*rounding, **quantization.kwargs)  # type: ignore[arg-type]


def calibrated_codes(quantization: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of a ``quarot::quantize_weight`` node: codes, scale and zero point.

    Raises:
        NotCalibratedError: the weight was not calibrated as it is rotated and quantised here.
    """
    weight, bits, _, _, symmetric, *_ = quantization.args
    made = expression(quantization)
    known: dict[Hashable, PackedCodes] = _CALIBRATED.get(made.leaves[0], {})
    found = known.get(made.key)
    if found is None:
        raise NotCalibratedError(parameter=parameters_of(quantization)[0], how=calibrated_by(quantization))
    val = weight.meta["val"]  # type: ignore[union-attr]
    codes = torch.ops.quarot.unpack(found.packed.to(val.device), bits, val.shape[-1], symmetric)
    return codes, found.scale.to(val.device), found.zero.to(val.device)
