"""The nodes that take a tensor to integer codes and back: an activation at run time, a weight once."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from quarot_fx.clip_search import quantize_weight
from quarot_fx.config import QuantScheme
from quarot_fx.errors import GroupSizeError
from quarot_fx.float64 import evaluate
from quarot_fx.graph import Inserter, argument_nodes
from quarot_fx.program import Program

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
    insert: Inserter, program: Program, weight: fx.Node, scheme: QuantScheme, parameter: str, dim: int
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Quantise a constant along one of its last two axes and insert what is stored of it.

    Returns:
        packed codes ``[..., rows, bytes]``, scales and zero points ``[..., rows, groups]`` (None if symmetric), with
        the quantised axis last.

    Raises:
        GroupSizeError: the scheme's group does not divide the axis.
    """
    size = weight.meta["val"].shape[dim]
    if scheme.group is not None and size % scheme.group:
        raise GroupSizeError(option="w_group", group=scheme.group, size=size, where=parameter)
    made: dict[str, Tensor] = {}

    def part(name: str) -> Tensor:
        if not made:
            codes, scale, zero = quantize_weight(evaluate(weight).movedim(dim, -1).float(), scheme)
            made.update(codes=quarot.pack(codes, scheme.bits), scale=scale.float())
            made.update({} if zero is None else {"zero": zero})
        return made[name]

    def stored(name: str) -> fx.Node:
        tensor = program.constant(weight, f"{name} of {scheme} along {dim}", lambda: part(name))
        return insert.constant(f"{parameter}.{name}", tensor, parameter)

    return stored("codes"), stored("scale"), None if scheme.symmetric else stored("zero")


def dequantization_of(node: fx.Node) -> fx.Node | None:
    """Return what made a node's value of codes, or None if it was not. Quantised over an axis that is not the last
    one, a tensor is transposed for that, and back.
    """
    made = argument_nodes(node)[0] if str(node.target) == "aten.transpose.int" else node
    return made if made.target is quarot.dequantize.default else None
