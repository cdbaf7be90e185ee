"""Looking at the values that a graph computes, without hooks: what looks at them is a node like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quarot_fx.float64 import Float64Interpreter
from quarot_fx.graph import with_sources
from quarot_fx.program import Program


@dataclass(frozen=True)
class Observer:
    """A question about the values of nodes.

    Attributes:
        look: answers it; called with the values, once.
        nodes: whose values they are.
    """

    look: Callable[..., Any]
    nodes: tuple[fx.Node, ...]


def observed(graph: fx.Graph, observers: Sequence[Observer]) -> fx.Graph:
    """Return a graph that computes what observers say, and of the given graph no more than they look at.

    An observer is called as soon as its last value is there, so that no value is kept for longer than it takes.
    """
    needed = with_sources(*(node for observer in observers for node in observer.nodes))
    pending: dict[fx.Node, list[Observer]] = {}
    for observer in observers:
        pending.setdefault(max(observer.nodes), []).append(observer)
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    answers: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = copy.node_copy(node, copies.__getitem__)
        for observer in pending.get(node, ()):
            seen = tuple(copies[one] for one in observer.nodes)
            answers[id(observer)] = copy.call_function(observer.look, seen)
    copy.output([answers[id(observer)] for observer in observers])
    return copy


def observe(program: Program, observers: Sequence[Observer], inputs: Sequence[Any]) -> list[Any]:
    """Run a program in float64 and return what observers say.

    Args:
        program: it stays as it is.
        observers: of its nodes.
        inputs: of all its placeholders, in order.
    """
    graph = observed(program.graph, observers)
    given = dict(zip(program.graph.find_nodes(op="placeholder"), inputs, strict=True))
    by_name = {node.name: value for node, value in given.items()}
    read = [by_name[node.name] for node in graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        return list(Float64Interpreter(program.graph_module, graph=graph).run(*read, enable_io_processing=False))
