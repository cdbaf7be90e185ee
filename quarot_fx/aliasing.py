"""What operators do to memory: which views they make and how those are undone, and what they write in place.

Mostly read from operator schemas (``Tensor(a)`` aliases, ``Tensor(a!)`` is written); the tables here are what
a schema does not say.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from quarot_fx.graph import stored_tensor, value

aten = torch.ops.aten

# In-place operators that lack a functional counterpart of the same name and signature.
COPIES = {aten.copy_.default, aten.fill_.Tensor}
RENAMED = {"normal_": "normal_functional"}
NEW_CONTENT = {aten.fill_.Scalar: aten.full_like.default, aten.zero_.default: aten.zeros_like.default}

# Views.
ALIASES = {aten.alias.default, aten.detach.default, aten.detach_.default}
SCATTERS = {  # views of a part, and what replaces that part
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
JOINS = {  # views of all parts as a list, and what puts the parts together again
    aten.split: aten.cat.default,
    aten.split_with_sizes: aten.cat.default,
    aten.chunk: aten.cat.default,
    aten.tensor_split: aten.cat.default,
    aten.unbind: aten.stack.default,
}
PERMUTATIONS = {
    *(aten.transpose, aten.permute, aten.t, aten.numpy_T, aten.mT),
    *(aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims),
}
RESHAPES = {
    *(aten.view, aten.view_as, aten.reshape, aten.reshape_as),
    *(aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten),
}


def packet(node: Any) -> Any:
    """Return a node's operator without its overload, or None."""
    return getattr(node.target, "overloadpacket", None)


def argument(node: fx.Node, name: str) -> Any:
    """Return the argument that a node passes for a parameter of its schema, or the default."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            passed = dict(enumerate(node.args)) | node.kwargs
            return passed.get(position, passed.get(name, parameter.default_value))
    raise LookupError(f"{node.target} has no parameter {name}")


def storage_keys(node: fx.Node) -> set[int]:
    """Return the identities of the storages that a node's value sees, negative for those out of reach."""
    return {_storage_key(leaf) for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)}


def _storage_key(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse, or under vmap
        return -id(tensor)


def equal_sizes(some: Any, others: Any) -> bool:
    """Compare sizes or strides without adding a guard."""
    return len(some) == len(others) and all(statically_known_true(a == b) for a, b in zip(some, others, strict=True))


def same_layout(a: torch.Tensor, strides: Sequence[Any]) -> bool:
    """Whether a tensor has these strides, up to those of axes with one element."""
    return all(
        statically_known_true(size == 1) or statically_known_true(mine == other)
        for size, mine, other in zip(a.shape, a.stride(), strides, strict=True)
    )


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose storage a node writes."""
    if isinstance(node.target, HigherOrderOperator):
        return node.all_input_nodes if _mutates_operands(node) else []
    if not isinstance(node.target, OpOverload) or is_alias(node):
        return []
    written = [
        argument(node, parameter.name)
        for parameter in node.target._schema.arguments
        if parameter.alias_info is not None and parameter.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, fx.Node)]


def _mutates_operands(node: fx.Node) -> bool:
    """Whether a higher-order operator writes what it is given, itself or in one of its subgraphs."""
    bodies: list[Any] = [stored_tensor(source) for source in node.all_input_nodes if source.op == "get_attr"]
    return str(node.target).endswith("_mutation") or any(
        written_nodes(inner) for body in bodies if isinstance(body, fx.GraphModule) for inner in body.graph.nodes
    )


def viewed(node: fx.Node) -> Any:
    """Return the argument that a node may be a view of."""
    written = written_nodes(node)
    return written[0] if written else next(iter(node.args), None)


def is_alias(node: fx.Node) -> bool:
    """Whether a node is the same tensor as its first argument, to anyone but autograd."""
    return (
        node.op == "get_attr"
        or node.target in ALIASES
        or (node.target in (aten.dropout.default, aten.dropout_.default) and not argument(node, "train"))
    )


def is_replayable(node: fx.Node) -> bool:
    """Whether a view can be taken again of new content of its first argument."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or node.target is aten.as_strided.default:
        return False  # as_strided addresses memory, not elements
    parameter = node.target._schema.arguments[0]
    return parameter.alias_info is not None and not parameter.alias_info.is_write


def functional_overload(target: Any) -> Any:
    """Return the functional counterpart of an in-place ATen operator, found by name and schema, or None."""
    if target in COPIES:
        return target  # handled as its source, expanded and cast
    if target in NEW_CONTENT:
        return NEW_CONTENT[target]
    name = target._schema.name.partition("::")[2]
    if name.startswith("__i"):
        name = "__" + name.removeprefix("__i")  # __ior__ -> __or__
    elif name.endswith("_"):
        name = RENAMED.get(name, name.removesuffix("_"))
    family = getattr(aten, name, None) if target.namespace == "aten" else None
    for overload in family.overloads() if family else ():
        candidate = getattr(family, overload)
        makes_tensor = [str(result.type) for result in candidate._schema.returns] == ["Tensor"]
        if makes_tensor and not candidate._schema.is_mutable and _signature(candidate) == _signature(target):
            return candidate
    return None


def _signature(overload: OpOverload) -> list[tuple[str, str]]:
    return [(parameter.name, str(parameter.type)) for parameter in overload._schema.arguments]


def inverse_permutation(view: fx.Node) -> list[int]:
    """Return the permutation of axes that undoes ``transpose``, ``permute``, ``movedim``, ...

    Learnt from what the operator does to a tensor whose sizes are all different.
    """
    rank = value(view).dim()
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    permuted: Any = view.target(probe, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return sorted(range(rank), key=list(permuted.shape).__getitem__)
