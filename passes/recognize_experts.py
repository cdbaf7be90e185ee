"""Products with matrices picked from a stack, one for each row, become one operator: linear layers of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from quarot_fx.graph import Constants, Inserter, argument_nodes, is_float, is_tensor
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
PRODUCTS = {"aten.bmm.default", "aten.matmul.default"}


@dataclass(frozen=True)
class RecognizeExperts(Pass):
    """``W[e] @ x -> expert_linear(x, W, e)`` and ``x @ W[e] -> expert_linear(x, W^T, e)``, for a stack of weights
    ``W`` and the expert ``e`` of each row.
    """

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for node in list(program.graph.nodes):
            if str(node.target) not in PRODUCTS or not is_tensor(node) or node.meta["val"].ndim != 3:
                continue
            left, right = argument_nodes(node)
            # The rows of x are vectors: the axis beside the contracted one has size 1.
            if _is_picked(left, constants) and right.meta["val"].shape[-1] == 1:
                self._rewrite(node, x=right, picked=left, axis=2)
            elif _is_picked(right, constants) and left.meta["val"].shape[-2] == 1:
                self._rewrite(node, x=left, picked=right, axis=1)
            else:
                continue
            report.matched += 1

    def _rewrite(self, node: fx.Node, x: fx.Node, picked: fx.Node, axis: int) -> None:
        """Replace a product; ``axis`` is the one of size 1 that its operand and its result have besides."""
        weight, experts = argument_nodes(picked)
        insert = Inserter(node.graph, self.name, node)
        with node.graph.inserting_before(node):
            if axis == 1:  # the weight is on the right
                weight = insert.call(aten.transpose.int, weight, 1, 2)
            rows = argument_nodes(x)[0] if _is_view(x, "unsqueeze", axis) else insert.call(aten.squeeze.dim, x, axis)
            result = insert.call(quarot.expert_linear.default, rows, weight, experts)
            for user in list(node.users):
                if _is_view(user, "squeeze", axis):
                    user.replace_all_uses_with(result)
                    node.graph.erase_node(user)
            if node.users:
                node.replace_all_uses_with(insert.call(aten.unsqueeze.default, result, axis))


def _is_picked(node: fx.Node, constants: Constants) -> bool:
    """Whether a node is ``W[e]``: a matrix of a constant stack for each of a list of numbers."""
    if str(node.target) != "aten.index.Tensor" or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False
    weight, experts = argument_nodes(node)
    return (
        weight in constants
        and experts not in constants
        and is_float(weight)
        and weight.meta["val"].ndim == 3
        and experts.meta["val"].ndim == 1
        and experts.meta["val"].dtype == torch.int64
    )


def _is_view(node: fx.Node, kind: str, axis: int) -> bool:
    return str(node.target).startswith(f"aten.{kind}.d") and node.args[1] in (axis, axis - 3)
