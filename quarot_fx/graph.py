"""What passes need of an FX graph beyond FX itself: inserting nodes with their fake values, and constants."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate

from quarot_fx.meta import fake_on

aten = torch.ops.aten
PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")
PARAMETER = "parameter"  # node.meta[PARAMETER]: the name that a get_attr node's tensor has in the user's model
PART = "quarot_part"  # node.meta[PART]: what of a parameter a constant node holds, such as "scale"
AUTHOR = "quarot_pass"  # node.meta[AUTHOR]: the pass that inserted the node
FROZEN = "quarot_frozen"  # node.meta[FROZEN]: why no edge to this node may be rewritten (it is mutated in place)

# Operators that read nothing but sizes, dtype and device of all their arguments, or of the second one.
METADATA_READERS = {
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "sym_size", "sym_numel"), "all"),
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"), "all"),
    **dict.fromkeys(("type_as", "expand_as", "view_as", "reshape_as"), "second"),
}


def value(node: Any) -> Any:
    """Return the fake value of a node (a FakeTensor, SymInt or tuple), or the argument itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node that holds one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_float(node: Any) -> bool:
    """Whether an argument is a node that holds a real floating-point tensor."""
    return is_tensor(node) and node.meta["val"].dtype.is_floating_point


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode that the graph's values were made under."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_result(node: fx.Node, fake_mode: FakeTensorMode) -> Any:
    """Return the fake value of a call with the arguments that it has now."""
    with torch.no_grad(), fake_mode, enable_python_dispatcher():  # which symbolic sizes need
        return node.target(*map_aggregate(node.args, value), **map_aggregate(node.kwargs, value))  # type: ignore[operator]


def module_path(node: fx.Node) -> str:
    """Return where in the user's model a node comes from, such as ``layers.3.mlp.down_proj``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"^[LG]\['\w+'\]\.?", "", path)
    return re.sub(r"(_modules)?\[['\"]?(\w+)['\"]?\]", r"\2", path) or node.name


class Inserter:
    """Inserts nodes into a graph at a place, with fake values and provenance.

    Args:
        graph: the graph to insert into.
        author: name of the pass that inserts.
        like: the node that the new ones stand for; its provenance is copied.
    """

    def __init__(self, graph: fx.Graph, author: str, like: fx.Node) -> None:
        self.graph, self.author, self.like = graph, author, like
        self.fake_mode = fake_mode_of(graph)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's current insertion point and return its node."""
        node = self.graph.call_function(target, args, kwargs)
        self._describe(node, fake_result(node, self.fake_mode))
        return node

    def constant(self, name: str, tensor: torch.Tensor, parameter: str | None = None) -> fx.Node:
        """Register a tensor as a buffer of the owning module and insert a ``get_attr`` for it."""
        owner = self.graph.owning_module
        assert owner is not None, "the graph belongs to no module that could hold a constant"
        name = unused_name(owner, name)
        owner.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        with torch.no_grad():
            if tensor.is_meta:  # it stands for a tensor where all others are
                self._describe(node, fake_on(tensor, value(self.like).device, self.fake_mode))
            else:
                self._describe(node, self.fake_mode.from_tensor(tensor, static_shapes=True))
        if parameter:
            node.meta[PARAMETER] = parameter
        return node

    def _describe(self, node: fx.Node, val: Any) -> None:
        node.meta.update({key: self.like.meta[key] for key in PROVENANCE if key in self.like.meta})
        node.meta["val"] = val
        node.meta[AUTHOR] = self.author


def unused_name(module: torch.nn.Module, name: str) -> str:
    """Return ``name`` as an attribute name that ``module`` does not have yet."""
    name = re.sub(r"\W", "_", name)
    name = name if name.isidentifier() else f"_{name}"  # "0.weight" in a Sequential
    candidate, count = name, 0
    while hasattr(module, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def after(node: fx.Node) -> fx.Node:
    """Return the node before which something that reads ``node`` can be inserted (inputs stay at the top)."""
    nearest = node.next
    while nearest.op == "placeholder":
        nearest = nearest.next
    return nearest


def hoist(constant: fx.Node, before: fx.Node) -> None:
    """Move a constant to where a node that comes earlier can read it, with all that it is made of."""
    if constant > before:
        for source in constant.all_input_nodes:
            hoist(source, before)
        before.prepend(constant)


class Constants:
    """The nodes whose value depends on parameters and other stored tensors only, never on an input or a cache.

    ``node in constants`` also answers for nodes that were inserted since.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._known: dict[fx.Node, bool] = {}
        self._written = written_tensors(graph)
        for node in graph.nodes:  # in order, so that no recursion goes deep
            self._known[node] = self._decide(node)

    def __contains__(self, node: fx.Node) -> bool:
        if node not in self._known:
            self._known[node] = self._decide(node)
        return self._known[node]

    def _decide(self, node: fx.Node) -> bool:
        if FROZEN in node.meta:
            return False
        if node.op == "get_attr":
            return is_tensor(node) and node.target not in self._written
        return (
            node.op == "call_function"
            and bool(node.all_input_nodes)
            and all(source in self for source in node.all_input_nodes)
            and is_deterministic(node)
        )


def written_tensors(graph: fx.Graph) -> set[str]:
    """Return the names of the stored tensors that a graph writes, such as caches."""
    writes = graph.find_nodes(op="call_function", target=aten.copy_.default)
    return {node.args[0].target for node in writes if node.args[0].op == "get_attr"}


def is_deterministic(node: fx.Node) -> bool:
    """Whether a call does nothing but return what follows from its arguments: it writes nothing and draws nothing."""
    return not node.is_impure() and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def with_sources(*nodes: fx.Node, without: Container[fx.Node] = ()) -> dict[fx.Node, None]:
    """Return nodes and all that they are computed from, in order of appearance, except through some others."""
    found: dict[fx.Node, None] = {}
    pending = list(reversed(nodes))
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending.extend(source for source in reversed(node.all_input_nodes) if source not in without)
    return found


def leaves_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the stored tensors that a node depends on, in order of appearance."""
    return (source for source in with_sources(node) if source.op == "get_attr")


def parameters_of(node: fx.Node) -> list[str]:
    """Return the names of the parameters that a constant node depends on, in order of appearance."""
    return list(dict.fromkeys(leaf.meta.get(PARAMETER, str(leaf.target)) for leaf in leaves_of(node)))


def main_parameter_of(node: fx.Node) -> str:
    """Return the name of the largest parameter that a constant node depends on: a weight, not a gain folded into it."""
    largest = max(leaves_of(node), key=lambda leaf: leaf.meta["val"].numel(), default=node)
    return str(largest.meta.get(PARAMETER, largest.target))


def stored_tensor(node: fx.Node) -> torch.Tensor:
    """Return the real tensor that a ``get_attr`` node reads."""
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def argument_nodes(node: fx.Node) -> list[fx.Node]:
    """Return every node among a node's arguments in order, repeated when it is used twice."""
    found: list[fx.Node] = []

    def collect(source: fx.Node) -> fx.Node:
        found.append(source)
        return source

    fx.map_arg((node.args, node.kwargs), collect)
    return found


def replace_arguments(node: fx.Node, replacements: dict[int, fx.Node]) -> None:
    """Replace arguments by their place in :func:`argument_nodes`, and no other use of the same node."""
    places: Iterator[int] = iter(range(len(argument_nodes(node))))

    def swap(source: fx.Node) -> fx.Node:
        return replacements.get(next(places), source)

    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), swap)


def reads_values(user: fx.Node, source: fx.Node) -> bool:
    """Whether a node computes with the elements of an argument, rather than with its sizes, dtype or device only."""
    target = str(user.target).split(".")
    if target[0] != "aten" or target[1] not in METADATA_READERS:
        return True
    return METADATA_READERS[target[1]] == "second" and argument_nodes(user)[0] is source


def numel_hint(shape: Sequence[Any]) -> int:
    """Return the number of elements, with the sizes seen at compile time for symbolic dimensions."""
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else max(1, int(size.node.hint or 1))
    return count
