"""Gains, the vectors that norms and layer scales multiply by, move into linear layers, out of a rotation's way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.graph import Constants, Inserter, argument_nodes, hoist, is_tensor, module_path, replace_arguments
from quarot_fx.linear_like import LinearLike
from quarot_fx.passes.base import Pass
from quarot_fx.passes.readers import Blocked, Readers, keeps_last_axis
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldGains(Pass):
    """``W (g * x) = (W diag(g)) x`` where linear layers alone read it, else ``g * (W x) = (diag(g) W) x`` where one
    wrote it (QuaRot, section 3.1).
    """

    requires: ClassVar[tuple[str, ...]] = ("recognize-norms", "fold-biases")

    def run(self, program: Program, report: PassReport) -> None:
        readers = Readers(program.graph)
        for node in reversed(program.graph.nodes):  # so that of gains in a row the last makes way for the first
            gain = gain_of(node, readers.constants) if str(node.target) == "aten.mul.Tensor" else None
            if gain is None:
                continue
            x = next(operand for operand in argument_nodes(node) if operand is not gain)
            into = readers.of(node, through_scalings=True)
            writer = _writer(x, readers)
            if not isinstance(into, Blocked):
                for linear in into:
                    scale_weight(linear, gain, linear.spelling.contracted, self.name)
                    report.weights += 1
            elif writer is not None:
                scale_weight(writer, gain, writer.spelling.out, self.name)
                _scale_bias(writer, gain, self.name)
                report.weights += 1
            else:
                report.decline(module_path(node), f"a gain stays: {into.reason}")
                continue
            stand_in(node, x, self.name)
            report.matched += 1


def gain_of(node: fx.Node, constants: Constants) -> fx.Node | None:
    """Return the operand that is a constant vector along the last axis, if the other one is an activation."""
    operands = argument_nodes(node)
    if len(operands) != 2 or not all(map(is_tensor, (node, *operands))):
        return None
    for gain, x in (operands, operands[::-1]):
        if gain in constants and x not in constants:  # asked first: comparing symbolic sizes would add guards
            size, spanned = gain.meta["val"].shape[-1:].numel(), x.meta["val"].shape[-1:]
            is_vector = gain.meta["val"].numel() == size > 1 and gain.meta["val"].ndim <= x.meta["val"].ndim
            return gain if is_vector and all(isinstance(s, int) and s == size for s in spanned) else None
    return None


def scale_weight(linear: LinearLike, gain: fx.Node, dim: int, author: str) -> None:
    """Replace a linear layer's weight by the weight times a gain along one of its axes."""
    weight, node = linear.weight, linear.node
    hoist(gain, node)
    insert = Inserter(node.graph, author, node)
    with node.graph.inserting_before(node):
        gain = insert.call(aten.reshape.default, gain, [-1] + [1] * (-dim - 1))
        scaled = insert.call(aten.mul.Tensor, weight, gain)
        scaled = insert.call(aten.to.dtype, scaled, weight.meta["val"].dtype)
    replace_arguments(node, {linear.spelling.weight: scaled})


def _scale_bias(linear: LinearLike, gain: fx.Node, author: str) -> None:
    bias, node = linear.bias, linear.node
    if bias is None or linear.spelling.bias is None:
        return
    insert = Inserter(node.graph, author, node)
    with node.graph.inserting_before(node):
        scaled = insert.call(aten.mul.Tensor, bias, insert.call(aten.reshape.default, gain, [-1]))
        scaled = insert.call(aten.to.dtype, scaled, bias.meta["val"].dtype)
    replace_arguments(node, {linear.spelling.bias: scaled})


def _writer(x: fx.Node, readers: Readers) -> LinearLike | None:
    """Return the linear layer that wrote x and that nothing else reads."""
    while len(x.users) == 1:
        if x in readers.linears:
            linear = readers.linears[x]
            return linear if linear.bias is None or linear.bias in readers.constants else None
        if not keeps_last_axis(x):
            return None
        x = argument_nodes(x)[0]
    return None


def stand_in(node: fx.Node, x: fx.Node, author: str) -> None:
    """Let the activation stand for its product or sum with a constant, in the type of that."""
    if x.meta["val"].dtype != node.meta["val"].dtype:
        with node.graph.inserting_before(node):
            x = Inserter(node.graph, author, node).call(aten.to.dtype, x, node.meta["val"].dtype)
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)  # at once: who reads x is asked again
