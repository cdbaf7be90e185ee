"""Regions that ``torch.vmap`` vectorises are written out as the operators that they become.

Dynamo's graph enters and leaves them by calls (an associative scan is made of such regions). The tracer that keeps
``linear`` whole does not see through the batched tensors in between and would take what comes out for constants.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._functorch import predispatch
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from quarot_fx.graph import PROVENANCE
from quarot_fx.program import copy_graph_module

ENTER, LEAVE = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting


def write_out_vmaps(gm: fx.GraphModule) -> fx.GraphModule:
    """Return Dynamo's graph, or a copy of it without vectorised regions if it has any."""
    if not any(node.target is ENTER for node in gm.graph.nodes):
        return gm
    gm = copy_graph_module(gm)
    for region in _regions(gm.graph):
        _write_out(gm, region)
    gm.recompile()
    return gm


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes from the entry of every outermost region to its end."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is ENTER:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        depth -= node.target is LEAVE
    return regions


def _write_out(gm: fx.GraphModule, region: list[fx.Node]) -> None:
    inside = set(region)
    inputs = list(dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in inside))
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    traced = _traced(gm, region, inputs, outputs)
    made: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(region[0]):
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                setattr(gm, name := f"vmap_{id(traced)}_{node.target}", getattr(traced, node.target))
                made[node] = gm.graph.get_attr(name)
            elif node.op == "call_function":
                made[node] = gm.graph.node_copy(node, made.__getitem__)
                made[node].meta = {key: region[0].meta[key] for key in PROVENANCE if key in region[0].meta}
                if "val" in node.meta:  # torch 2.11 gives sizes none
                    made[node].meta["example_value"] = node.meta["val"]
    (results,) = traced.graph.find_nodes(op="output")
    for old, new in zip(outputs, results.args[0], strict=True):
        old.replace_all_uses_with(made[new])
    for node in reversed(region):
        gm.graph.erase_node(node)


def _traced(gm: fx.GraphModule, region: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """Trace a region by itself, below vectorisation."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    values = [node.meta["example_value"] for node in inputs]
    fake_mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with fake_mode:
        return make_fx(fx.GraphModule(gm, graph), _allow_non_fake_inputs=True)(*values)
