"""Equal spellings that a graph needs before passes may change it: nothing here changes what it computes."""

from __future__ import annotations

import torch
from torch import fx

from quarot_fx.graph import FROZEN

aten = torch.ops.aten


def legalize(graph: fx.Graph) -> None:
    """Make a functional graph independent of the strides and dtypes that it was captured with."""
    _relax_views(graph)
    _write_out_default_eps(graph)


def _relax_views(graph: fx.Graph) -> None:
    """Turn views into reshapes, which are the same in a functional graph but accept any strides: passes change them."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        if FROZEN not in node.meta:
            node.target = aten.reshape.default


def _write_out_default_eps(graph: fx.Graph) -> None:
    """Make ``rms_norm``'s default eps a number: it depends on the dtype, which a check in float64 changes."""
    for node in graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        if (node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")) is None:
            wide = torch.promote_types(node.meta["val"].dtype, torch.float32)
            node.args = (*node.args, None, None)[:3]
            node.kwargs = {"eps": torch.finfo(wide).eps}
