"""Equal spellings that a graph needs before passes may change it: nothing here changes what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import FROZEN, Inserter, argument_nodes, fake_mode_of, stored_tensor, value

aten = torch.ops.aten
BY_EXAMPLE: dict[Any, Any] = {
    **dict.fromkeys((aten.new_empty.default, aten.empty_like.default), aten.empty.memory_format),
    **dict.fromkeys((aten.new_zeros.default, aten.zeros_like.default), aten.zeros.default),
    **dict.fromkeys((aten.new_ones.default, aten.ones_like.default), aten.ones.default),
    **dict.fromkeys((aten.new_full.default, aten.full_like.default), aten.full.default),
    aten.expand_as.default: aten.expand.default,
    aten.type_as.default: aten.to.device,
}


def legalize(graph: fx.Graph) -> None:
    """Make a functional graph independent of the strides and dtypes that it was captured with."""
    _write_out_einsums(graph)
    _take_slices(graph)
    _forget_examples(graph)
    _relax_views(graph)
    _write_out_default_eps(graph)


def _write_out_einsums(graph: fx.Graph) -> None:
    """Turn einsums into the permutations, views and one product that they are, whose axes have a fixed meaning."""
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = node.args[0], argument_nodes(node)
        with torch.no_grad(), fake_mode_of(graph), enable_python_dispatcher():
            traced = make_fx(lambda *tensors, equation=equation: torch.einsum(equation, *tensors))(
                *map(value, operands)
            )
        with graph.inserting_before(node):
            node.replace_all_uses_with(_inlined(traced.graph, operands, Inserter(graph, "legalize", node)))
        graph.erase_node(node)


def _inlined(graph: fx.Graph, arguments: list[fx.Node], insert: Inserter) -> fx.Node:
    """Insert the operators of a graph with one result, and return that."""
    made = dict(zip(graph.find_nodes(op="placeholder"), arguments, strict=True))
    for node in (node for node in graph.nodes if node.op == "call_function"):
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = insert.call(node.target, *args, **kwargs)
    (output,) = graph.find_nodes(op="output")
    return made[output.args[0]]


def _take_slices(graph: fx.Graph) -> None:
    """Turn ``x[:, [2, 3]]``, with known positions side by side, into ``x[:, 2:4]``: a part, not a gathering."""
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
            part = Inserter(graph, "legalize", node).call(aten.slice.Tensor, source, dim, start, start + len(positions))
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _known_positions(index: fx.Node) -> list[int] | None:
    """Return the entries of an index that the model's code spells out, rather than stores or computes."""
    tensor = stored_tensor(index) if index.op == "get_attr" else None
    if tensor is None or isinstance(tensor, FakeTensor) or tensor.dtype != torch.int64:
        return None
    return tensor.tolist() if tensor.ndim == 1 and tensor.numel() else None


def _forget_examples(graph: fx.Graph) -> None:
    """Say sizes, dtype and device outright, not by the example of a tensor, which would count as read, and be kept."""
    for node in list(graph.nodes):
        if node.target not in BY_EXAMPLE or FROZEN in node.meta:
            continue
        val, shape = value(node), list(value(node).shape)
        if not all(isinstance(size, int) for size in shape):
            if not str(node.target).startswith("aten.new_"):
                continue
            shape = node.args[1]
        target = BY_EXAMPLE[node.target]
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
