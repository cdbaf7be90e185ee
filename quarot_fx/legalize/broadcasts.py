"""What is expanded to meet an operand of full size meets it as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quarot_fx.graph import FROZEN, argument_nodes, is_tensor, replace_arguments

aten = torch.ops.aten
EXPANSIONS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
BROADCASTING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.true_divide.Tensor}


def drop_expansions(graph: fx.Graph) -> None:
    """``x / expand(y) -> x / y``: a factor that is the same all along an axis can be seen to be so."""
    for node in graph.nodes:
        operands = argument_nodes(node) if node.target in BROADCASTING and FROZEN not in node.meta else []
        if len(operands) != 2 or not all(map(is_tensor, operands)):
            continue
        for place in (0, 1):
            expanded, other = argument_nodes(node)[place], argument_nodes(node)[1 - place]
            if expanded.target in EXPANSIONS and FROZEN not in expanded.meta and _fills(expanded, other, node):
                replace_arguments(node, {place: argument_nodes(expanded)[0]})
    graph.eliminate_dead_code(fx.Node.is_impure)


def _fills(expanded: fx.Node, other: fx.Node, node: fx.Node) -> bool:
    """Whether the result keeps its shape and dtype without the expansion."""
    source = argument_nodes(expanded)[0].meta["val"]
    if source.ndim == 0 and source.dtype != other.meta["val"].dtype:
        return False  # the dtype of a tensor without axes counts for less
    shape = node.meta["val"].shape
    return all(
        any(statically_known_true(_size(operand, dim) == size) for operand in (source, other.meta["val"]))
        for dim, size in enumerate(reversed(shape), start=1)
    )


def _size(tensor: torch.Tensor, dim_from_last: int) -> Any:
    return tensor.shape[-dim_from_last] if dim_from_last <= tensor.ndim else 1
