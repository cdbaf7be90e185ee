"""Constants of a rewritten graph become inputs, so that one compiled graph serves every set of weights.

Regional compilation shows why: all layers of a model run through one Dynamo graph, each with its own weights. Compiled
once, the graph gets the constants of whichever layer calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from quarot_fx.capture import INPUT
from quarot_fx.graph import is_tensor, stored_tensor
from quarot_fx.program import copy_graph_module


@dataclass(frozen=True)
class Lifted:
    """A graph without stored tensors.

    Attributes:
        graph_module: takes the arguments at ``places``, then ``constants``.
        places: which arguments of the captured graph it takes, live parameters among them.
        constants: what was stored.
    """

    graph_module: fx.GraphModule
    places: tuple[int, ...]
    constants: tuple[torch.Tensor, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        """What must be equal for two sets of constants to be served by one compiled graph."""
        layout = [(t.shape, t.stride(), t.dtype, t.device) for t in self.constants]
        return self.graph_module.code, self.places, layout

    def example_inputs(self, arguments: Sequence[Any]) -> list[Any]:
        """Return inputs to compile with: Dynamo's own, which its fake mode knows, and fake constants, whose sizes stay
        static under ``dynamic=True`` too.
        """
        fakes = [node.meta["val"] for node in self.graph_module.graph.find_nodes(op="placeholder")]
        return [*(arguments[place] for place in self.places), *fakes[len(self.places) :]]


def lift(module: fx.GraphModule) -> Lifted:
    """Turn every stored tensor of a graph into an input: live parameters where they came from, constants at the end."""
    module = copy_graph_module(module)
    graph = module.graph
    live: dict[Any, fx.Node] = {}  # by place
    constants: dict[Any, fx.Node] = {}  # by name
    for node in list(graph.find_nodes(op="placeholder")):
        if node.users or not is_tensor(node):
            live[node.meta[INPUT]] = node
        else:
            graph.erase_node(node)
    stored = [node for node in graph.find_nodes(op="get_attr") if is_tensor(node)]
    tensors = {str(node.target): stored_tensor(node) for node in stored}
    for node in stored:
        key = node.meta.get(INPUT, str(node.target))
        found = live if INPUT in node.meta else constants
        if key not in found:
            with graph.inserting_before(next(iter(graph.nodes))):  # the first may be one that was erased by now
                found[key] = _placeholder(graph, node)
        node.replace_all_uses_with(found[key])
        graph.erase_node(node)
    ordered = [live[place] for place in sorted(live)] + list(constants.values())
    for node in reversed(ordered):
        next(iter(graph.nodes)).prepend(node)
    for name in tensors:
        delattr(module, name)
    module._param_name_to_source = {}  # type: ignore[assignment]  # AOTAutograd looks at sources of Dynamo's graphs only
    module.recompile()
    return Lifted(module, tuple(sorted(live)), tuple(tensors[name] for name in constants))


def _placeholder(graph: fx.Graph, stored: fx.Node) -> fx.Node:
    """Insert an input in place of a stored tensor, marked for Inductor as one whose address does not change."""
    node = graph.placeholder(str(stored.target))
    node.meta = dict(stored.meta)
    node._dynamo_source = getattr(stored, "_dynamo_source", None) or ConstantSource(f"quarot.{stored.target}")
    if INPUT not in stored.meta:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
    return node
