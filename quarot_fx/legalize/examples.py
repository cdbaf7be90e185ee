"""Tensors made after the example of another are made by sizes, dtype and device."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import FROZEN, Inserter, value

aten = torch.ops.aten
BY_EXAMPLE: dict[Any, Any] = {
    **dict.fromkeys((aten.new_empty.default, aten.empty_like.default), aten.empty.memory_format),
    **dict.fromkeys((aten.new_zeros.default, aten.zeros_like.default), aten.zeros.default),
    **dict.fromkeys((aten.new_ones.default, aten.ones_like.default), aten.ones.default),
    **dict.fromkeys((aten.new_full.default, aten.full_like.default), aten.full.default),
    aten.expand_as.default: aten.expand.default,
    aten.type_as.default: aten.to.device,
}


def forget_examples(graph: fx.Graph) -> None:
    """``zeros_like(x) -> zeros(sizes)``: the example counts as read, and would be kept alive. Symbolic sizes of an
    example need it all the same.
    """
    for node in list(graph.nodes):
        if node.target not in BY_EXAMPLE or FROZEN in node.meta:
            continue
        target, val, shape = BY_EXAMPLE[node.target], value(node), list(value(node).shape)
        if not all(isinstance(size, int) for size in shape) and target is not aten.to.device:
            if not str(node.target).startswith("aten.new_"):
                continue
            shape = argument(node, "size")
        insert = Inserter(graph, "legalize", node)
        with graph.inserting_before(node):
            if target is aten.expand.default:
                new = insert.call(target, node.args[0], shape)
            elif target is aten.to.device:
                new = insert.call(target, node.args[0], val.device, val.dtype)
            else:
                fill = [argument(node, "fill_value")] if target is aten.full.default else []
                new = insert.call(target, shape, *fill, dtype=val.dtype, device=val.device)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
