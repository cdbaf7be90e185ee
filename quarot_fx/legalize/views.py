"""Views that depend on strides become ones that do not."""

from __future__ import annotations

import torch
from torch import fx

from quarot_fx.graph import FROZEN, Inserter

aten = torch.ops.aten


def relax_views(graph: fx.Graph) -> None:
    """Turn views into reshapes, which are the same in a functional graph but accept any strides: passes change them.
    Pairs seen as complex numbers have no such form, and are made contiguous.
    """
    for view in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=view):
            if FROZEN not in node.meta:
                node.target = aten.reshape.default
    for node in graph.find_nodes(op="call_function", target=aten.view_as_complex.default):
        if FROZEN not in node.meta:
            with graph.inserting_before(node):
                pairs = Inserter(graph, "legalize", node).call(aten.contiguous.default, node.args[0])
            node.args = (pairs,)
