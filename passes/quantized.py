"""The nodes that take a tensor to integer codes and back: an activation at run time, a weight once."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quarot_fx.config import QuantScheme
from quarot_fx.errors import ClipNotCalibratedError, GroupSizeError
from quarot_fx.graph import PART, Inserter, argument_nodes
from quarot_fx.ops import quantize_asymmetric, quantize_symmetric

aten, quarot = torch.ops.aten, torch.ops.quarot
QUANTIZE = {True: quantize_symmetric, False: quantize_asymmetric}  # by symmetry
ROUNDING = "quarot_rounding"  # node.meta[ROUNDING]: how the codes that a dequantisation reads were rounded


def insert_quantized(insert: Inserter, x: fx.Node, scheme: QuantScheme, dim: int = -1) -> fx.Node:
    """Insert ``dequantize(quantize(x))`` over one axis and return its node."""
    if dim != -1:
        last = insert.call(aten.transpose.int, x, dim, -1)
        return insert.call(aten.transpose.int, insert_quantized(insert, last, scheme), dim, -1)
    parts = insert.call(QUANTIZE[scheme.symmetric], x, scheme.bits, scheme.group, scheme.clip)
    codes, scale = insert.call(operator.getitem, parts, 0), insert.call(operator.getitem, parts, 1)
    zero = None if scheme.symmetric else insert.call(operator.getitem, parts, 2)
    return insert.call(quarot.dequantize.default, codes, scale, zero, x.meta["val"].dtype)


def insert_packed(
    insert: Inserter, weight: fx.Node, scheme: QuantScheme, parameter: str, dim: int, rounding: str = "nearest"
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Insert the quantisation of a constant along one of its last two axes; ``fold-constants`` will store its results.

    Returns:
        packed codes ``[..., rows, bytes]``, scales and zero points ``[..., rows, groups]`` (None if symmetric), with
        the quantised axis last.

    Raises:
        GroupSizeError: the scheme's group does not divide the axis.
    """
    size = weight.meta["val"].shape[dim]
    if scheme.group is not None and size % scheme.group:
        raise GroupSizeError(option="w_group", group=scheme.group, size=size, where=parameter)
    rows = weight if dim == -1 else insert.call(aten.transpose.int, weight, dim, -1)
    clip = None if isinstance(scheme.clip, str) else scheme.clip
    error = {"error": "output"} if scheme.clip == "output" else {}
    parts = insert.call(
        quarot.quantize_weight.default, rows, scheme.bits, scheme.group, clip, scheme.symmetric, rounding, **error
    )

    def part(index: int, name: str) -> fx.Node:
        node = insert.call(operator.getitem, parts, index)
        node.meta[PART] = name
        return node

    codes = insert.call(quarot.pack.default, part(0, "codes"), scheme.bits)
    codes.meta[PART] = "codes"
    return codes, part(1, "scale"), None if scheme.symmetric else part(2, "zero")


def check_clip_is_known(scheme: QuantScheme, option: str, where: str) -> None:
    """Raise :class:`ClipNotCalibratedError` if the clip ratio of a scheme is still to be searched for."""
    if isinstance(scheme.clip, str):
        raise ClipNotCalibratedError(option=option, value=scheme.clip, where=where)


@dataclass(frozen=True)
class QuantizedActivation:
    """A tensor that is quantised and dequantised at run time.

    Attributes:
        dequantized: the result.
        source: what is quantised, along its last axis.
        scheme: how.
    """

    dequantized: fx.Node
    source: fx.Node
    scheme: QuantScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A constant that is stored as codes.

    Attributes:
        codes: int8, or uint8 where there is a zero point; [..., rows, n].
        scale, zero: [..., rows, groups]; no zero point if codes are symmetric.
        bits: of a code.
        rounding: ``"nearest"``, ``"gptq"`` or ``"tuned"``.
    """

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    bits: int
    rounding: str


def quantized_activation(node: fx.Node) -> QuantizedActivation | None:
    """Return how a node's value was quantised at run time, or ``None`` if it was not."""
    dequantized, quantization = _dequantization_of(node), quantization_behind(node)
    if dequantized is None or quantization is None:
        return None
    return QuantizedActivation(dequantized, quantization.args[0], scheme_of(quantization))  # type: ignore[arg-type]


def quantization_behind(node: fx.Node) -> fx.Node | None:
    """Return what made the codes of a node's value at run time, or ``None`` if it was not quantised."""
    dequantized = _dequantization_of(node)
    made = argument_nodes(argument_nodes(dequantized)[0])[:1] if dequantized is not None else []
    return made[0] if made and made[0].target in QUANTIZE.values() else None


def scheme_of(quantization: fx.Node) -> QuantScheme:
    """Return how a node quantises at run time."""
    _, bits, group, clip = quantization.args
    return QuantScheme(bits, group, quantization.target is QUANTIZE[True], clip)  # type: ignore[arg-type]


def set_clip(quantization: fx.Node, clip: float) -> None:
    """Change the clip ratio of a node that quantises at run time."""
    quantization.update_arg(3, clip)


def requantized(x: Tensor, like: fx.Node) -> Tensor:
    """Return another tensor quantised and dequantised as a node's value was at run time; as it is if that was not."""
    found = quantized_activation(like)
    if found is None:
        return x
    if found.dequantized is not like:  # quantised over another axis, and transposed back
        _, *dims = like.args
        return requantized(x.transpose(*dims), found.dequantized).transpose(*dims)  # type: ignore[arg-type]
    return rounded(x, found.scheme)


def rounded(x: Tensor, scheme: QuantScheme) -> Tensor:
    """Return a tensor quantised and dequantised along its last axis."""
    codes, scale, *zero = QUANTIZE[scheme.symmetric](x, scheme.bits, scheme.group, scheme.clip)
    return quarot.dequantize(codes, scale, zero[0] if zero else None, x.dtype)


def quantized_weight(node: fx.Node) -> QuantizedWeight | None:
    """Return the codes that a node's value was made of, or ``None`` if it is not stored as codes."""
    dequantized = _dequantization_of(node)
    if dequantized is None:
        return None
    unpacked: Any
    unpacked, scale, zero, _ = dequantized.args
    if unpacked.target is not quarot.unpack.default:
        return None
    packed, bits, *_ = unpacked.args
    codes = packed.args[0] if packed.target is quarot.pack.default else unpacked
    return QuantizedWeight(codes, scale, zero, bits, dequantized.meta.get(ROUNDING, "nearest"))  # type: ignore[arg-type]


def quantization_of(node: fx.Node) -> fx.Node | None:
    """Return the ``quarot::quantize_weight`` node that made the codes of a node's value, or ``None`` if none did."""
    weight = quantized_weight(node)
    made = argument_nodes(weight.codes)[:1] if weight is not None else []
    return made[0] if made and made[0].target is quarot.quantize_weight.default else None


def _dequantization_of(node: fx.Node) -> fx.Node | None:
    """Return what made a node's value of codes. Quantised over an axis that is not the last one, a tensor is transposed
    for that, and back.
    """
    made = argument_nodes(node)[0] if str(node.target) == "aten.transpose.int" else node
    return made if made.target is quarot.dequantize.default else None
