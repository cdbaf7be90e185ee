"""Observers see the values of nodes, in float64 and once each, and nothing is computed that none of them looks at."""

from __future__ import annotations

import torch
from graphs import Lambda, exported, tokens

from quarot_fx.observation import Observer, observe, observed


def nodes(program):
    return {str(node.target).split(".")[1]: node for node in program.graph.nodes if node.op == "call_function"}


def test_answers_come_in_the_order_of_the_observers():
    program = exported(Lambda(lambda m, x: (x.sin().exp(), x.cos())), tokens())
    found, seen = nodes(program), []

    def look(*values):
        seen.append(values)
        return tuple(value.dtype for value in values)

    answers = observe(
        program,
        [
            Observer(look, (found["exp"],)),
            Observer(look, (found["sin"],)),
            Observer(look, (found["cos"], found["sin"])),
        ],
        [tokens()],
    )
    assert answers == [(torch.float64,), (torch.float64,), (torch.float64, torch.float64)]
    x = tokens().double()
    assert len(seen) == 3
    assert any(
        len(values) == 2 and torch.equal(values[0], x.cos()) and torch.equal(values[1], x.sin()) for values in seen
    )
    assert any(torch.equal(values[0], x.sin().exp()) for values in seen)


def test_nothing_is_computed_that_nobody_looks_at():
    program = exported(Lambda(lambda m, x, y: (x.sin().exp(), y.cos())), tokens(), tokens())
    before = program.graph_module.code
    graph = observed(program.graph, [Observer(torch.Tensor.sum, (nodes(program)["sin"],))])
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "call_function", "output"]
    assert program.graph_module.code == before
    (answer,) = observe(program, [Observer(torch.Tensor.sum, (nodes(program)["sin"],))], [tokens(), tokens()])
    assert answer == tokens().double().sin().sum()
