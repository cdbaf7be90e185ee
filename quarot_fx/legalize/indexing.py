"""Entries picked by a list that the model's code spells out are a slice, where they lie side by side."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses import FakeTensor

from quarot_fx.graph import Inserter, stored_tensor, value

aten = torch.ops.aten


def take_slices(graph: fx.Graph) -> None:
    """``x[:, [2, 3]] -> x[:, 2:4]``: a part of an axis, not a gathering."""
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        source, indices = node.args
        dim = len(indices) - 1
        positions = _known_positions(indices[dim]) if not any(indices[:dim]) else None
        size = value(source).shape[dim]
        if positions is None or not isinstance(size, int):
            continue
        start = positions[0] % size
        if [position % size for position in positions] != list(range(start, start + len(positions))):
            continue
        with graph.inserting_before(node):
            insert = Inserter(graph, "legalize", node)
            part = insert.call(aten.slice.Tensor, source, dim, start, start + len(positions))
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _known_positions(index: fx.Node) -> list[int] | None:
    """Return the entries of an index that is in the code, rather than stored by the model or computed."""
    tensor = stored_tensor(index) if index.op == "get_attr" else None
    if tensor is None or isinstance(tensor, FakeTensor) or tensor.dtype != torch.int64:
        return None
    return tensor.tolist() if tensor.ndim == 1 and tensor.numel() else None
