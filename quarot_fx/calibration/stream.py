"""Runs a captured graph on all calibration sequences at once, node by node, as far as it is asked to.

Between two stops only the values live that something later reads, and constants only while a segment reads them:
weights are rotated, and codes dequantised, once for all sequences.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from quarot_fx.float64 import evaluate
from quarot_fx.graph import Constants, reads_values, stored_tensor, with_sources


class Stream:
    """A program that runs in step over several sequences.

    Args:
        graph: a functional graph; what it writes at its end, such as a cache, stays as it is.
        tokens: the placeholder that differs from sequence to sequence.
        sequences: its values, each of the shape that the graph was captured with.
        inputs: the values of all other placeholders.
        wanted: the nodes that :meth:`advance` will be asked for, each as often as :meth:`forget` will be.
        offload: keep values on the CPU between stops.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tokens: fx.Node,
        sequences: Sequence[Tensor],
        inputs: Mapping[fx.Node, Any],
        wanted: Iterable[fx.Node],
        offload: bool = False,
    ) -> None:
        self._wanted = Counter(wanted)
        self._constants = Constants(graph)
        needed = with_sources(*self._wanted)
        self._nodes = [node for node in graph.nodes if node in needed and node not in self._constants]
        self._places = {node: place for place, node in enumerate(self._nodes)}
        self._last_use = dict.fromkeys((tokens, *needed), -1)
        self._varying = {tokens}
        for place, node in enumerate(self._nodes):
            self._last_use.update(dict.fromkeys(node.all_input_nodes, place))
            if any(source in self._varying and reads_values(node, source) for source in node.all_input_nodes):
                self._varying.add(node)
        self._last_use.update(dict.fromkeys(self._wanted, len(self._nodes)))  # until whoever wants them has read them
        self._device, self._offload = sequences[0].device, offload
        self._shared: dict[fx.Node, Any] = {node: value for node, value in inputs.items() if node in needed}
        self._values: list[dict[fx.Node, Any]] = [{tokens: sequence} for sequence in sequences]
        self._next = 0

    def advance(self, wanted: Sequence[fx.Node]) -> None:
        """Run as far as it takes to compute some nodes."""
        segment = self._nodes[self._next : 1 + max(self._places.get(node, -1) for node in wanted)]
        self._next += len(segment)
        for one in segment:
            for source in one.all_input_nodes:
                if source in self._constants and source not in self._shared:
                    self._shared[source] = _constant(source)
        for one in segment:
            if one not in self._varying and one not in self._shared:
                self._shared[one] = _run(one, self._shared)
        varying = [one for one in segment if one in self._varying and one.op != "placeholder"]
        for values in self._values:
            self._run_all(varying, values)
        self._drop_read(self._shared)

    def values(self, node: fx.Node) -> Iterator[Any]:
        """Yield a node's value for each sequence in turn, of a node that was just computed or is still to be read."""
        for values in self._values:
            yield self._here(self._shared[node] if node in self._shared else values[node])

    def ahead(self, node: fx.Node, replaced: Mapping[fx.Node, Tensor]) -> Iterator[Any]:
        """Yield a later node's value for each sequence, if some constants had other values; the stream stays put.

        Args:
            node: which all that is wanted is computed no later than.
            replaced: constants, and their other values.
        """
        segment = self._nodes[self._next : 1 + self._places.get(node, -1)]
        shared = {**self._shared, **replaced}
        for one in segment:
            for source in one.all_input_nodes:
                if source in self._constants and source not in shared:
                    shared[source] = _constant(source)
        for one in segment:
            if one not in self._varying and one not in shared:
                shared[one] = _run(one, shared)
        varying = [one for one in segment if one in self._varying and one.op != "placeholder"]
        for values in self._values:
            local = {source: self._here(value) for source, value in values.items()}
            for one in varying:
                local[one] = _run(one, ChainMap(local, shared))
                for source in one.all_input_nodes:
                    if self._last_use[source] == self._places[one]:
                        local.pop(source, None)
            yield local[node] if node in local else shared[node]

    def forget(self, wanted: Sequence[fx.Node]) -> None:
        """Let go of the values of wanted nodes, unless they are wanted again or something later reads them."""
        self._wanted.subtract(wanted)
        for node in wanted:
            if not self._wanted[node]:
                self._last_use[node] = max(
                    (self._places[user] for user in node.users if user in self._places), default=-1
                )
        for values in self._values:
            self._drop_read(values)

    def _run_all(self, nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
        read = {source for node in nodes for source in node.all_input_nodes}
        local = {node: self._here(value) for node, value in values.items() if node in read}
        for node in nodes:
            local[node] = _run(node, ChainMap(local, self._shared))
            for source in node.all_input_nodes:
                if self._last_use[source] == self._places[node]:
                    local.pop(source, None)
        values.update(local)
        self._drop_read(values)
        if self._offload:
            values.update({node: _on(torch.device("cpu"), value) for node, value in values.items()})

    def _drop_read(self, values: dict[fx.Node, Any]) -> None:
        """Drop what nothing reads any more."""
        for node in [node for node in values if self._last_use[node] < self._next]:
            del values[node]

    def _here(self, value: Any) -> Any:
        return _on(self._device, value)


def _run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return stored_tensor(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _constant(node: fx.Node) -> Tensor:
    """Return a constant's value in its own dtype."""
    if node.op == "get_attr":
        return stored_tensor(node).detach()
    return evaluate(node).to(node.meta["val"].dtype)


def _on(device: torch.device, value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
