"""The nodes that take a tensor to integer codes and back: an activation at run time, a weight once."""

from __future__ import annotations

import operator

import torch
from torch import fx

from quarot_fx.config import QuantScheme
from quarot_fx.errors import GroupSizeError
from quarot_fx.graph import PART, Inserter, argument_nodes

aten, quarot = torch.ops.aten, torch.ops.quarot


def insert_quantized(insert: Inserter, x: fx.Node, scheme: QuantScheme, dim: int = -1) -> fx.Node:
    """Insert ``dequantize(quantize(x))`` over one axis and return its node."""
    if dim != -1:
        last = insert.call(aten.transpose.int, x, dim, -1)
        return insert.call(aten.transpose.int, insert_quantized(insert, last, scheme), dim, -1)
    quantize = quarot.quantize_symmetric.default if scheme.symmetric else quarot.quantize_asymmetric.default
    parts = insert.call(quantize, x, scheme.bits, scheme.group, scheme.clip)
    codes, scale = insert.call(operator.getitem, parts, 0), insert.call(operator.getitem, parts, 1)
    zero = None if scheme.symmetric else insert.call(operator.getitem, parts, 2)
    return insert.call(quarot.dequantize.default, codes, scale, zero, x.meta["val"].dtype)


def insert_packed(
    insert: Inserter, weight: fx.Node, scheme: QuantScheme, parameter: str, dim: int
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
    clip = None if scheme.clip == "search" else float(scheme.clip)
    parts = insert.call(quarot.quantize_weight.default, rows, scheme.bits, scheme.group, clip, scheme.symmetric)

    def part(index: int, name: str) -> fx.Node:
        node = insert.call(operator.getitem, parts, index)
        node.meta[PART] = name
        return node

    codes = insert.call(quarot.pack.default, part(0, "codes"), scheme.bits)
    codes.meta[PART] = "codes"
    return codes, part(1, "scale"), None if scheme.symmetric else part(2, "zero")


def dequantization_of(node: fx.Node) -> fx.Node | None:
    """Return what made a node's value of codes, or None if it was not. Quantised over an axis that is not the last
    one, a tensor is transposed for that, and back.
    """
    made = argument_nodes(node)[0] if str(node.target) == "aten.transpose.int" else node
    return made if made.target is quarot.dequantize.default else None
