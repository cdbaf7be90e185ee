"""Defaults that depend on the dtype become numbers."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def write_out_default_eps(graph: fx.Graph) -> None:
    """Make ``rms_norm``'s default eps a number: it depends on the dtype, which a check in float64 changes."""
    for node in graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        if (node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")) is None:
            wide = torch.promote_types(node.meta["val"].dtype, torch.float32)
            node.args = (*node.args, None, None)[:3]
            node.kwargs = {"eps": torch.finfo(wide).eps}
