"""What a linear layer is for, told from where its result goes: the output head and routers stay as they are."""

from __future__ import annotations

import torch
from torch import fx

from quarot_fx.config import QuarotConfig
from quarot_fx.graph import Constants, is_tensor
from quarot_fx.linear_like import LinearLike

aten = torch.ops.aten
CHOOSING = {
    "aten.topk.default",
    "aten.sort.default",
    "aten.argmax.default",
    "aten.argsort.default",
    "aten.max.dim",
}
REASONS = {
    "router": "it is a router: its result is ranked; name it in overrides to quantise it",
    "head": "it is the output head: its result is the model's output; name it in overrides to quantise it",
}
REACH = 12  # operators between a router's scores and the choice, at most


class Roles:
    """Roles of the linear layers of one graph.

    Args:
        graph: the graph.
        config: whose ``overrides`` ask for a layer by name.
    """

    def __init__(self, graph: fx.Graph, config: QuarotConfig) -> None:
        self._config = config
        self._constants = Constants(graph)
        self._is_whole_model = any(str(node.target) == "aten.embedding.default" for node in graph.nodes)

    def reason_to_keep_precision(self, linear: LinearLike) -> str | None:
        """Return why neither a linear layer nor its input is quantised, or None. One asked for by name always is."""
        if self._config.override_for(linear.parameter):
            return None
        return REASONS.get(self.role(linear))

    def role(self, linear: LinearLike) -> str:
        """Return ``"router"``, ``"head"``, or nothing for a layer like any other."""
        if self._chooses(linear.node):
            return "router"
        weight = linear.weight.meta["val"]
        expands = weight.shape[linear.spelling.out] > weight.shape[linear.spelling.contracted]
        # A part of a model may end in any linear; only one that expands can be the head there.
        if (self._is_whole_model or expands) and self._is_read_by_output_only(linear.node):
            return "head"
        return ""

    def _others(self, user: fx.Node) -> list[fx.Node]:
        return [source for source in user.all_input_nodes if is_tensor(source) and source not in self._constants]

    def _is_read_by_output_only(self, node: fx.Node) -> bool:
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                if user.op == "output" or user in seen:
                    continue
                if len(self._others(user)) != 1 or str(user.target) in (
                    "aten.linear.default",
                    "aten.embedding.default",
                ):
                    return False
                seen.add(user)
                pending.append(user)
        return bool(node.users)

    def _chooses(self, node: fx.Node) -> bool:
        frontier = {node}
        for _ in range(REACH):
            users = {user for current in frontier for user in current.users if user.op == "call_function"}
            if any(str(user.target) in CHOOSING for user in users):
                return True
            frontier = {user for user in users if len(self._others(user)) == 1 and _keeps_shape(user)}
        return False


def _keeps_shape(node: fx.Node) -> bool:
    """Whether the last axis of a node is that of its first tensor argument: scores stay scores."""
    source = next((s for s in node.all_input_nodes if is_tensor(s)), None)
    return (
        is_tensor(node)
        and source is not None
        and node.meta["val"].shape[-1:] == source.meta["val"].shape[-1:]
        and "linear" not in str(node.target)
        and "mm" not in str(node.target)
    )
