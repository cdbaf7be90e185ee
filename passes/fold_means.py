"""LayerNorm's centring moves from the readers of the residual stream into its writers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.graph import Inserter, argument_nodes, is_tensor, module_path, reads_values, replace_arguments
from quarot_fx.linear_like import LinearLike
from quarot_fx.passes.base import Pass
from quarot_fx.passes.readers import Readers, keeps_last_axis, scales_vectors
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
CENTRING = "quarot.project_out.default"


@dataclass(frozen=True)
class FoldMeans(Pass):
    """``P (W x + b) = (P W) x + P b`` with ``P = I - u u^T``: when every reader of a stream removes the mean, its
    writers may do it once and for all (SliceGPT, section 3.2; QuaRot, section 3.1).
    """

    requires: ClassVar[tuple[str, ...]] = ("recognize-norms", "fold-biases", "fold-gains")

    def run(self, program: Program, report: PassReport) -> None:
        readers = Readers(program.graph)
        done: set[fx.Node] = set()
        for node in list(program.graph.nodes):
            if str(node.target) != CENTRING or node in done:
                continue
            stream = _Stream(readers)
            reason = stream.grow_from(argument_nodes(node)[0])
            done.update(stream.centrings)
            if reason:
                report.decline(module_path(node), f"a mean is removed online: {reason}")
                continue
            for writer in stream.writers:
                report.weights += _centre_writer(writer, readers, self.name)
            for operand, user in stream.constants:
                _centre_constant(operand, user, self.name)
            for centring in stream.centrings:
                centring.replace_all_uses_with(argument_nodes(centring)[0])
                program.graph.erase_node(centring)
                report.matched += 1


class _Stream:
    """All tensors that are sums of the same writers, their writers, and the centrings that read them."""

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self.writers: list[fx.Node] = []
        self.constants: list[tuple[fx.Node, fx.Node]] = []
        self.centrings: list[fx.Node] = []

    def grow_from(self, start: fx.Node) -> str | None:
        """Collect the stream around a tensor; returns why it cannot be centred at its writers, or None."""
        seen, pending = {start}, [start]
        while pending:
            node = pending.pop()
            sources, reason = self._sources(node)
            if reason:
                return reason
            for user in node.users:
                if not reads_values(user, node):
                    continue
                if str(user.target) == CENTRING:
                    self.centrings.append(user)
                elif self._is_linear_map(user):
                    sources.append(user)
                else:
                    reader = "the graph's output" if user.op == "output" else f"{user.target} {user.name}"
                    return f"the stream is also read by {reader}, which sees the mean"
            pending += [near for near in sources if near not in seen]
            seen.update(sources)
        return None

    def _sources(self, node: fx.Node) -> tuple[list[fx.Node], str | None]:
        operands = [operand for operand in argument_nodes(node) if is_tensor(operand)]
        constants = [operand for operand in operands if operand in self.readers.constants]
        takes_rows = str(node.target) == "aten.embedding.default" or keeps_last_axis(node)
        if node in self.readers.linears or (takes_rows and operands[0] in constants):
            self.writers.append(node)
            return [], None
        if not self._is_linear_map(node):
            return [], f"{node.target} {node.name} writes the stream and cannot be centred"
        if keeps_last_axis(node):
            return operands[:1], None
        spanning = [operand for operand in operands if _spans(operand, node)]
        self.constants += [(operand, node) for operand in spanning if operand in constants]
        return [operand for operand in spanning if operand not in constants], None

    def _is_sum(self, node: fx.Node) -> bool:
        return str(node.target) in ("aten.add.Tensor", "aten.sub.Tensor")

    def _is_linear_map(self, node: fx.Node) -> bool:
        """Whether a node commutes with removing the mean: a sum of vectors, or their product with scalars."""
        if not is_tensor(node) or node.op != "call_function":
            return False
        operands = [operand for operand in argument_nodes(node) if is_tensor(operand)]
        spanning = [operand for operand in operands if _spans(operand, node)]
        if self._is_sum(node):
            return len(operands) == 2 and len(spanning) == 2
        if str(node.target) in ("aten.sum.dim_IntList", "aten.mean.dim"):
            return _keeps_last_axis_of_sum(node)
        return keeps_last_axis(node) or any(scales_vectors(node, operand) for operand in spanning)


def _keeps_last_axis_of_sum(node: fx.Node) -> bool:
    source, dims = node.args[0], node.args[1] if len(node.args) > 1 else None
    ndim = source.meta["val"].ndim  # type: ignore[union-attr]
    return isinstance(dims, list | tuple) and bool(dims) and all(dim % ndim != ndim - 1 for dim in dims)


def _spans(operand: fx.Node, node: fx.Node) -> bool:
    return operand.meta["val"].shape[-1:] == node.meta["val"].shape[-1:]


def _without_mean(insert: Inserter, weight: fx.Node, dim: int) -> fx.Node:
    return insert.call(aten.sub.Tensor, weight, insert.call(aten.mean.dim, weight, [dim], True))


def _centre_writer(node: fx.Node, readers: Readers, author: str) -> int:
    """Remove the mean over the output axis from a linear layer's weight and bias, or from a table's rows."""
    insert = Inserter(node.graph, author, node)
    linear: LinearLike | None = readers.linears.get(node)
    with node.graph.inserting_before(node):
        if linear is None:
            replace_arguments(node, {0: _without_mean(insert, argument_nodes(node)[0], -1)})
            return 1
        replace_arguments(node, {linear.spelling.weight: _without_mean(insert, linear.weight, linear.spelling.out)})
        if linear.bias is not None and linear.spelling.bias is not None:
            replace_arguments(node, {linear.spelling.bias: _without_mean(insert, linear.bias, -1)})
            return 2
    return 1


def _centre_constant(operand: fx.Node, user: fx.Node, author: str) -> None:
    with user.graph.inserting_before(user):
        centred = _without_mean(Inserter(user.graph, author, user), operand, -1)
    replace_arguments(user, {argument_nodes(user).index(operand): centred})
