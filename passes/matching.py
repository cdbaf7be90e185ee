"""How fusing passes read a graph: past what leaves every row, or every number, as it is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from quarot_fx.aliasing import argument, equal_sizes
from quarot_fx.graph import FROZEN, Inserter, is_float, is_tensor, value
from quarot_fx.passes.readers import CASTS, keeps_last_axis

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)  # with the sizes as their argument
VIEWS = {*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints}


def before_casts(node: fx.Node) -> fx.Node:
    """Return what a tensor was before it was cast and copied: the same numbers, not rounded since."""
    return _before(node, lambda dtype, later: True)


def before_widening(node: fx.Node) -> fx.Node:
    """Return what a tensor was before casts to wider types and copies: exactly the same numbers."""
    return _before(node, lambda dtype, later: torch.promote_types(dtype, later) == later)


def before_copies(node: fx.Node) -> fx.Node:
    """Return what a tensor was before copies: exactly the same numbers in the same type."""
    return _before(node, operator.is_)


def _before(node: fx.Node, may_become: Callable[[torch.dtype, torch.dtype], bool]) -> fx.Node:
    while (source := _elementwise_source(node)) is not None and may_become(value(source).dtype, value(node).dtype):
        node = source
    return node


def _elementwise_source(node: fx.Node) -> fx.Node | None:
    """Return the operand whose elements a node's result has, each in its place, or ``None`` if there is none."""
    if not is_float(node) or FROZEN in node.meta:
        return None
    sources = [source for source in node.all_input_nodes if is_tensor(source)]
    if node.target is aten.cat.default:
        sources = [source for source in sources if 0 not in [s for s in value(source).shape if isinstance(s, int)]]
        is_same = len(sources) == 1  # the others are empty, as is a cache at first
    else:
        is_same = str(node.target) in CASTS or node.target is aten.slice.Tensor
    if not is_same or not is_float(sources[0]) or FROZEN in sources[0].meta:
        return None
    val, source_val = value(node), value(sources[0])
    return sources[0] if val.device == source_val.device and equal_sizes(val.shape, source_val.shape) else None


def before_views(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return what a tensor was before its rows, the vectors of its last axis, were cast and arranged anew.

    Returns:
        that tensor, and the views that arrange its rows, in their order.
    """
    views: list[fx.Node] = []
    while True:
        node = before_casts(node)
        if not _arranges_rows(node):
            return node, tuple(reversed(views))
        views.append(node)
        node = node.all_input_nodes[0]


def _arranges_rows(node: fx.Node) -> bool:
    if FROZEN in node.meta:
        return False
    if node.target is aten.permute.default:
        return argument(node, "dims")[-1] in (-1, value(node).ndim - 1)
    if node.target is aten.transpose.int:
        return not {argument(node, "dim0"), argument(node, "dim1")} & {-1, value(node).ndim - 1}
    return node.target in VIEWS and keeps_last_axis(node)


def insert_views(insert: Inserter, source: fx.Node, views: tuple[fx.Node, ...]) -> fx.Node:
    """Arrange the rows of a tensor, of any length, as :func:`before_views` found those of another arranged."""
    for view in views:
        arguments: list[Any] = list(view.args[1:])
        if view.target in RESHAPES:
            arguments[0] = [*arguments[0][:-1], value(source).shape[-1]]
        source = insert.call(view.target, source, *arguments, **view.kwargs)  # type: ignore[arg-type]
    return source


def replace_operand(insert: Inserter, operand: fx.Node, fused: fx.Node, views: tuple[fx.Node, ...]) -> None:
    """Let readers of a ``quantize_activation`` read what a fused op returns in its place, with the rows arranged."""
    for part in list(operand.users):
        index = part.args[1]
        result = insert.call(operator.getitem, fused, index)
        if value(result).shape != (0,):  # as that of zero points is where there are none
            result = insert_views(insert, result, views)
        part.replace_all_uses_with(result)


def operands(node: fx.Node, target: torch._ops.OpOverload) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield both orders of the operands of a node that calls a commutative operator on two tensors."""
    if node.target is target and len(node.args) == 2 and not node.kwargs and all(is_tensor(arg) for arg in node.args):
        first, second = node.args
        yield first, second  # type: ignore[misc]
        yield second, first  # type: ignore[misc]


def reason_against_tokens(x: fx.Node, most: int) -> str | None:
    """Return why an activation is not one of so many tokens at most, if it is not."""
    shape = value(x).shape
    if all(isinstance(size, int) for size in shape[:-1]) and math.prod(shape[:-1]) <= most:
        return None
    return f"an activation {tuple(shape)} has more tokens than {most}, or is not known to have no more"


def number(given: Any) -> float | None:
    """Return the number that an argument is. One that Dynamo made symbolic, such as a module's eps, is guarded on."""
    known = value(given)
    if isinstance(known, torch.SymInt | torch.SymFloat):
        return float(known) if known.node.hint is not None else None
    return float(known) if isinstance(known, int | float) else None
