"""Soundness of the table of rules: what a rule ties may be rotated together, and the operator still tells the truth.

For every operator with a rule, an orthogonal matrix is applied to all positions that the rule ties (to none that it
pins), in the operands and in the results. If the rule is right, ``op(Q x) == Q op(x)``.
"""

from math import prod
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import INPUTS, calls, operator
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from quarot_fx.basis.analysis import Analysis, Position
from quarot_fx.basis.rules import rules
from quarot_fx.rotation import Rotation

# What is a barrier whatever its arguments are.
BARRIERS = {
    *(name for name, rule in rules().items() if rule.__name__ in ("non_linear", "choice")),
    *("aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar", "aten.flip.default", "aten.roll.default"),
    *("aten.ones.default", "aten.full.default", "aten.copy_.default"),
    *("quarot.quantize_asymmetric.default", "quarot.quantize_symmetric.default", "quarot.dequantize.default"),
    *("aten.where.Scalar", "aten.masked_fill.Tensor"),
}


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.cat([rows @ w for rows, w in zip(x.tensor_split(ends[:-1].tolist()), weight, strict=True)])


INSTEAD = {  # of operators without float64, and of those whose result is whatever was in memory
    "aten._grouped_mm.default": grouped_mm,
    "transformers.grouped_mm_fallback.default": grouped_mm,
    "aten.empty.memory_format": torch.zeros,
    "aten.empty_like.default": torch.zeros_like,
    "aten.new_empty.default": Tensor.new_zeros,
}


# -- the property ----------------------------------------------------------------------------------


def call_node(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Node, list[Tensor]]:
    """Return a graph's only call, with the tensors that it reads; their values are real ones."""
    graph, operands = fx.Graph(), []

    def read(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        operands.append(argument)
        node = graph.placeholder(f"x{len(operands)}")
        node.meta["val"] = argument
        return node

    args, kwargs = map_aggregate((args, kwargs), read)
    node = graph.call_function(target, args, kwargs)
    graph.output(node)
    node.meta["val"] = run(node, operands)
    return node, operands


def run(node: fx.Node, operands: list[Tensor]) -> Any:
    values = iter(operands)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(values))
    return INSTEAD.get(str(node.target), node.target)(*args, **kwargs)


def free_groups(analysis: Analysis, node: fx.Node) -> list[list[Position]]:
    """Return the sets of positions of one operator that share a basis which may be any."""
    tensors = [use for (user, _), use in analysis.uses.items() if user is node] + analysis.results[node]
    found = [pair for tensor in tensors for axis in tensor.axes() for pair in analysis.positions(axis)]
    factors = {factor for factor, _ in found}
    network = nx.Graph()
    network.add_nodes_from(position for _, position in found)
    network.add_edges_from(pair for pairs in analysis.ties_by_factor(factors).values() for pair in pairs)
    pinned = {position for pins in analysis.pins_by_factor(factors).values() for position, _ in pins}
    turned = {position for turn in analysis.turns for _, position in analysis.positions(turn.axis)}
    return [list(group) for group in nx.connected_components(network) if not group & (pinned | turned)]


def rotated(value: Tensor, position: Position, matrix: Tensor, analysis: Analysis) -> Tensor:
    sizes = [analysis.factors.size(leaf) for leaf in analysis.leaves(position.tensor.axis(position.dim))]
    inner = prod(sizes[position.factor + 1 :])
    assert sizes[position.factor] == len(matrix), "positions of one group have one size"
    moved = value.movedim(position.dim, -1)
    parts = moved.reshape(*moved.shape[:-1], -1, len(matrix), inner)
    return torch.einsum("...ofi,fg->...ogi", parts, matrix).reshape(moved.shape).movedim(-1, position.dim).contiguous()


def check(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> int:
    """Check one call; returns how many bases it leaves free."""
    node, operands = call_node(target, args, kwargs)
    analysis = Analysis(node.graph)
    groups = free_groups(analysis, node)
    bases = {}
    for group in groups:
        tensor, dim, place = group[0]
        order = analysis.factors.size(analysis.leaves(tensor.axis(dim))[place])
        bases[id(group)] = torch.linalg.qr(torch.randn(order, order, generator=generator).double())[0]
    for chosen in [[group] for group in groups] + [groups]:
        inputs = list(operands)
        outputs = list(node.meta["val"]) if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        for group in chosen:
            for position in group:
                side = outputs if position.tensor.user is None else inputs
                place = position.tensor.index
                side[place] = rotated(side[place], position, bases[id(group)], analysis)
        actual = run(node, inputs)
        actual = list(actual) if isinstance(actual, tuple | list) else [actual]
        torch.testing.assert_close(actual, outputs, rtol=1e-9, atol=1e-9, equal_nan=True)
    return len(groups)


@pytest.mark.parametrize("name", rules())
@settings(max_examples=6, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.sampled_from([4, 6, 2, 3, 1])] * 4), seed=st.integers(0, 2**16))
def test_what_a_rule_ties_may_be_rotated(name: str, sizes: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for args, kwargs in calls(name, sizes, generator):
        check(operator(name), args, kwargs, generator)


@pytest.mark.parametrize("name", rules())
def test_a_rule_leaves_some_basis_free_or_is_a_barrier(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    free = [check(operator(name), *call, generator) for call in calls(name, (4, 6, 2, 3), generator)]
    assert free, "no inputs are generated"
    assert any(free) != (name in BARRIERS)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [1, -1])
def test_a_transform_returns_what_it_reads_in_the_basis_that_its_rule_turns_to(dim: int, inverse: bool) -> None:
    x = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    node, operands = call_node(operator("quarot.rotate.default"), (x, "random-12-seed3", dim, 1, inverse), {})
    analysis = Analysis(node.graph)
    (turn,) = analysis.turns
    ((_, position),) = analysis.positions(turn.axis)
    matrix = Rotation.parse(turn.rotation).matrix()
    if inverse:
        torch.testing.assert_close(rotated(node.meta["val"], position, matrix, analysis), operands[0])
    else:
        torch.testing.assert_close(rotated(operands[0], position, matrix, analysis), node.meta["val"])
    assert (position.tensor.user is None) == inverse


def test_every_rule_has_inputs_and_every_input_a_rule() -> None:
    assert set(INPUTS) == set(rules()), "a rule without inputs here is a rule that nobody checks"
