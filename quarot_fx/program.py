"""A captured graph with its weights, plan and reports: what passes work on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from quarot_fx.float64 import Known
from quarot_fx.store import WeightStore, expression

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from quarot_fx.basis.plan import RotationPlan
    from quarot_fx.report import PassReport


@dataclass
class Program:
    """The state that passes hand on.

    Attributes:
        graph_module: a functional graph of ATen operators; parameters are ``get_attr`` nodes whose tensors are the
            user's own, and every node has its fake value in ``meta["val"]``.
        store: where constants made from parameters are kept, so that graphs of one model share them.
        plan: where rotations go, once they are placed.
        reports: one per pass that ran.
        consumed: ``id`` of every parameter whose value went into a constant.
        original_bytes: of the parameters that the graph read when it was captured.
        known: results of nodes that are computed once, until ``fold-constants`` stores what is made of them.
        release: is told of parameters that nothing needs any more but constants that are made.
    """

    graph_module: fx.GraphModule
    store: WeightStore = field(default_factory=WeightStore)
    plan: RotationPlan | None = None
    reports: list[PassReport] = field(default_factory=list)
    consumed: set[int] = field(default_factory=set)
    original_bytes: int = 0
    known: Known = field(default_factory=dict)
    release: Callable[[Iterable[torch.Tensor]], None] = lambda _: None

    def __post_init__(self) -> None:
        if not self.original_bytes:
            tensors = {id(t): t for t in (*self.graph_module.parameters(), *self.graph_module.buffers())}
            self.original_bytes = sum(tensor.nbytes for tensor in tensors.values())

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.graph_module.graph

    @classmethod
    def of(cls, state: Program | fx.GraphModule | ExportedProgram, *inputs: Any) -> Program:
        """Make a program of an FX graph (or of a program: a private copy of it).

        Args:
            state: a program, an exported program, or a graph module of any origin.
            inputs: example inputs; needed only where nodes have no fake values yet.

        Raises:
            GraphInputError: example inputs are missing or do not fit.
        """
        if isinstance(state, Program):
            module = copy_graph_module(state.graph_module)
            return cls(
                module,
                state.store,
                state.plan,
                list(state.reports),
                set(state.consumed),
                state.original_bytes,
                release=state.release,
            )
        from quarot_fx.import_graph import import_graph  # which makes programs

        captured, arguments = import_graph(state, inputs)
        return captured.bind(arguments, WeightStore())

    def constant(self, node: fx.Node, purpose: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what ``compute`` makes of a constant node, from the store if another graph has made it already."""
        made = expression(node)
        self.consumed.update(id(leaf) for leaf in made.leaves)
        return self.store.get(made, purpose, compute)


def drop_unused_tensors(module: fx.GraphModule) -> None:
    """Let go of stored tensors that no node reads, so that their memory can be freed."""
    module.delete_all_unused_submodules()
    read = {str(node.target).partition(".")[0] for node in module.graph.find_nodes(op="get_attr")}
    for tensors in (module._parameters, module._buffers):
        for name in set(tensors) - read:
            delattr(module, name)


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph and its module's attributes by reference: weights are shared, nodes are not."""
    root = torch.nn.Module()
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        getattr(root, name).update(getattr(module, name))
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, torch.Tensor) or k == "meta"}
    root.__dict__.update(plain)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, mapping))
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # graph_copy keeps meta only
    with _use_lazy_graph_module(True):  # written out as Python when somebody looks at it or runs it
        new_module = _make_graph_module(root, graph)
    new_module.meta.update(module.meta)
    return new_module
