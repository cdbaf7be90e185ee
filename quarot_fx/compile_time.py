"""Values that follow from a graph alone, such as a causal mask, and so are known before it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from quarot_fx.aliasing import packet
from quarot_fx.graph import FROZEN, PARAMETER, is_deterministic, value, written_tensors
from quarot_fx.observation import Observer, observed

aten = torch.ops.aten
LARGEST = 2**30  # bytes of a value that is computed at compile time, at most
UNINITIALIZED = {aten.empty, aten.empty_strided, aten.empty_permuted}
ON_INPUT = "depends on the input"
SIZES = "has sizes that are known only at run time"

T = TypeVar("T")


class CompileTimeValues:
    """The nodes whose values depend on literals and factories such as ``arange`` only: on no input, no parameter or
    cache, and no random number.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._written = written_tensors(graph)
        self._reasons: dict[fx.Node, str | None] = {}
        for node in graph.nodes:  # in order, so that no recursion goes deep
            self._reasons[node] = self._decide(node)

    def reason_against(self, node: fx.Node) -> str | None:
        """Return why a value is not known before the graph runs, or is not computed, as a predicate; None if it is."""
        return self._reasons[node]

    def judge(self, nodes: Iterable[fx.Node], verdict: Callable[[torch.Tensor], T]) -> dict[fx.Node, T]:
        """Return what a function says of the values of nodes, in the dtypes and on the devices that the graph gives.

        Every value is computed once, and let go after its last use.
        """
        judged = list(dict.fromkeys(nodes))
        graph = observed(self._graph, [Observer(verdict, (node,)) for node in judged])
        with torch.no_grad():
            results = fx.Interpreter(self._graph.owning_module, graph=graph).run()  # type: ignore[arg-type]
        return dict(zip(judged, results, strict=True))

    def _decide(self, node: fx.Node) -> str | None:
        if isinstance(value(node), torch.SymInt | torch.SymFloat | torch.SymBool):
            return SIZES
        if node.op == "placeholder":
            return f"{ON_INPUT} {node.name!r}"
        if node.op == "get_attr" and (PARAMETER in node.meta or node.target in self._written):
            return f"depends on the stored tensor {node.meta.get(PARAMETER, node.target)!r}"
        if node.op == "get_attr":  # a literal
            return _reason_of_values(node)
        reasons = [reason for source in node.all_input_nodes if (reason := self._reasons[source]) is not None]
        # What a layer computes depends on its weights, too; the input says more.
        return min(reasons, key=lambda reason: not reason.startswith(ON_INPUT), default=None) or _reason_of_call(node)


def _reason_of_call(node: fx.Node) -> str | None:
    if node.op != "call_function" or not (_is_aten(node) or node.target is operator.getitem):
        return f"depends on {node.target}, which is no ATen operator"
    if not is_deterministic(node):
        return f"depends on {node.target}, whose result differs from call to call"
    if packet(node) in UNINITIALIZED:
        return "depends on uninitialised memory"
    return _reason_of_values(node)


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def _reason_of_values(node: fx.Node) -> str | None:
    if FROZEN in node.meta:
        return f"is changed in place: {node.meta[FROZEN]}"
    tensors = [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)]
    if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
        return SIZES
    if any(tensor.is_meta for tensor in tensors):
        return "has no data, only sizes"
    if max((tensor.untyped_storage().nbytes() for tensor in tensors), default=0) > LARGEST:
        return f"takes more than {LARGEST / 2**30:.0f} GiB, which is not computed at compile time"
    return None
