"""Transforms that a graph has before anything is planned: weights absorb them, others move, and some stay."""

import json

import torch
from graphs import WIDTH, Lambda, captured, difference, linear, rewritten, targets, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from quarot_fx.basis.plan import Given, RotationPlan
from quarot_fx.config import QuarotConfig
from quarot_fx.graph import FROZEN, Constants
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.rotate import Rotate

quarot = torch.ops.quarot
H = f"hadamard-{WIDTH}"


def planned(module, *inputs, wanted=(), **options):
    """Place and apply rotations, after a check that they change nothing; with what became of the graph's own.

    Of the linear layers none wants its input rotated but those that are named.
    """
    config = QuarotConfig(overrides={"*": "skip", **{name: {} for name in wanted}}, **options)
    program = captured(module, *inputs)
    result = rewritten(program, PlaceRotations(config), Rotate(config))
    assert difference(result, program, *inputs) < 1e-9
    assert RotationPlan.from_dict(json.loads(result.plan.to_json())) == result.plan
    return result, result.plan.given


def online(program):
    """The transforms that are left to run, as (rotation, inverse, operator that is transformed)."""
    constants = Constants(program.graph)
    nodes = program.graph.find_nodes(op="call_function", target=quarot.rotate.default)
    return [
        (
            node.args[1],
            node.args[4] if len(node.args) > 4 else node.kwargs.get("inverse", False),
            str(node.args[0].target),
        )
        for node in nodes
        if node not in constants
    ]


def stored(x, bits=4):
    """What a cache of codes makes of a tensor."""
    return quarot.dequantize(*quarot.quantize_asymmetric(x, bits, None, 0.95), x.dtype)


def test_weight_before_it_absorbs_a_transform():
    module = Lambda(lambda m, x: stored(quarot.rotate(m.a(x), H)), a=linear(WIDTH))
    program, (one,) = planned(module, tokens())
    assert online(program) == []
    assert (one.rotation, one.inverse, one.is_identity, one.by, one.why) == (H, False, True, ("a.weight",), "")


def test_weight_after_it_absorbs_an_inverse_one():
    module = Lambda(lambda m, x: m.a(quarot.rotate(stored(x), H, inverse=True)), a=linear(4))
    program, (one,) = planned(module, tokens())
    assert online(program) == []
    assert (one.inverse, one.is_identity, one.by) == (True, True, ("a.weight",))


def test_a_transform_after_what_is_not_linear_runs_where_it_did():
    module = Lambda(lambda m, x: stored(quarot.rotate(torch.relu(m.a(x)), H)), a=linear(WIDTH))
    program, (one,) = planned(module, tokens())
    assert online(program) == [(H, False, "aten.relu.default")]
    assert (one.is_identity, one.by) == (True, ("relu online",))
    (transform,) = program.plan.online
    assert "aten.relu relu: is not linear" in transform.why


def test_a_transform_moves_to_where_there_is_less_to_transform():
    """Before heads are repeated, as the cache's author may not have known."""

    def forward(m, x):
        heads = torch.relu(x)[:, :, None].expand(-1, -1, 5, -1)
        return stored(quarot.rotate(heads, H)), m.a(x)

    program, _ = planned(Lambda(forward, a=linear(4)), tokens())
    (transform,) = program.plan.online
    assert transform.shape == (2, 3, 1, WIDTH)


def test_queries_are_rotated_and_not_all_that_a_cache_holds():
    def attention(m, q, held):
        keys = quarot.rotate(stored(held), H, inverse=True)
        return F.scaled_dot_product_attention(m.q(q).sin(), keys, held)

    program, (keys,) = planned(Lambda(attention, q=linear(WIDTH)), tokens(2, 1, 1, WIDTH), tokens(2, 1, 40, WIDTH))
    assert (H, False, "aten.sin.default") in online(program)
    assert not any(target == "quarot.dequantize.default" for _, _, target in online(program))
    assert keys.by == ("sin online",)


def test_what_the_caller_gets_is_as_it_was():
    """An output is canonical, and so is what reads the transformed tensor."""
    module = Lambda(lambda m, x: (y := m.a(x), quarot.rotate(y, H)), a=linear(WIDTH))
    program, (one,) = planned(module, tokens())
    assert one.is_identity
    assert len(online(program)) == 1


def test_two_that_undo_each_other_vanish():
    module = Lambda(lambda m, x: m.a(quarot.rotate(quarot.rotate(stored(x), H, inverse=True), H)), a=linear(4))
    program, given = planned(module, tokens())
    assert [one.is_identity for one in given] == [True, True]
    assert online(program) == []


def test_a_rotation_of_another_name_is_taken_over_by_name():
    name = f"random-hadamard-{WIDTH}-seed3"
    module = Lambda(lambda m, x: stored(quarot.rotate(m.a(x), name)), a=linear(WIDTH))
    program, (one,) = planned(module, tokens())
    assert (online(program), one.is_identity, one.rotation) == ([], True, name)
    assert name in {transform.rotation for transform in program.plan.transforms}


def test_of_two_rotations_of_one_axis_the_second_stays():
    name = f"random-hadamard-{WIDTH}-seed3"

    def forward(m, x):
        y = m.a(x)
        return stored(quarot.rotate(y, H)) + stored(quarot.rotate(y, name))

    program, (first, second) = planned(Lambda(forward, a=linear(WIDTH)), tokens())
    assert (first.is_identity, second.is_identity) == (True, False)
    assert second.why == f"its axis is rotated by {H}, as another transform of the graph's own says"
    assert program.reports[-2].declined[0].reason == f"a transform of the graph's own stays: {second.why}"
    assert sorted(name for name, _, _ in online(program)) == [H, name]


def turned_pairs(x):
    even, odd = x.unflatten(-1, (-1, 2)).sin().unbind(-1)
    return torch.stack((even - odd, even + odd), -1).flatten(-2)


def test_an_axis_of_pairs_is_taken_over_as_one():
    """RoPE on pairs splits the axis in two for the whole graph, and both are rotated at the same places."""
    module = Lambda(lambda m, x: stored(quarot.rotate(turned_pairs(m.a(x)), H)), a=linear(WIDTH))
    program, (one,) = planned(module, tokens())
    assert one.is_identity
    assert [(name, inverse) for name, inverse, _ in online(program)] == [(H, False)]


def test_parts_of_an_axis_that_are_rotated_at_different_places_leave_the_transform():
    def forward(m, x):
        split = torch.sin(x).unflatten(-1, (8, 2))
        return stored(quarot.rotate(split.flatten(2), H)) + m.a(split.sum(-1))

    program, (one,) = planned(Lambda(forward, a=linear(WIDTH, width=8)), tokens(), wanted="a")
    assert (one.is_identity, one.why) == (False, "its axis is made of parts that are not rotated alike everywhere")
    assert (H, False, "aten.flatten.using_ints") in online(program)


def test_parts_in_another_order_leave_the_transform():
    def forward(m, x):
        split = m.a(x).unflatten(-1, (4, 4))
        return stored(quarot.rotate(split.transpose(2, 3).flatten(2), H)) + stored(quarot.rotate(split.flatten(2), H))

    _, given = planned(Lambda(forward, a=linear(WIDTH)), tokens())
    assert not all(one.is_identity for one in given)


def test_a_transform_of_a_part_of_an_axis_is_taken_as_it_is():
    module = Lambda(lambda m, x: stored(quarot.rotate(m.a(x), "hadamard-4", -1, 2)), a=linear(WIDTH))
    program, given = planned(module, tokens())
    assert given == ()
    assert [name for name, _, _ in online(program)] == ["hadamard-4"]


def test_a_frozen_tensor_leaves_the_transform():
    program = captured(Lambda(lambda m, x: stored(quarot.rotate(m.a(x), H)), a=linear(WIDTH)), tokens())
    (written,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    written.meta[FROZEN] = "somebody writes it in place"
    result = rewritten(program, PlaceRotations(), Rotate())
    (one,) = result.plan.given
    assert not one.is_identity
    assert "somebody writes it in place" in one.why
    assert difference(result, program, tokens()) < 1e-9


def test_rotation_none_leaves_the_graph_as_it_is():
    module = Lambda(lambda m, x: stored(quarot.rotate(m.a(x), H)), a=linear(WIDTH))
    program, given = planned(module, tokens(), rotation="none")
    assert given == ()
    assert targets(program) == targets(captured(module, tokens()))


def test_printed():
    from rich.console import Console

    given = (
        Given("rotate_1", H, False, "layers.0.attention", True, ("layers.0.attention.v.weight",)),
        Given("rotate_3", H, False, "layers.1.attention", True, ("layers.1.attention.v.weight",)),
        Given("rotate_2", H, True, "layers.0.attention", False, why="aten.mul mul_3: multiplies"),
    )
    console = Console(width=120)
    with console.capture() as text:
        console.print(RotationPlan(given=given))
    assert text.get().splitlines()[-2:] == [
        f"{H} of layers.*.attention is an identity, by layers.*.attention.v.weight (2 times)",
        f"{H} transposed of layers.*.attention stays: aten.mul mul: multiplies (1 times)",
    ]


STEPS = {
    "rotate": lambda m, x: quarot.rotate(x, H),
    "undo": lambda m, x: quarot.rotate(x, H, inverse=True),
    "other": lambda m, x: quarot.rotate(x, f"random-{WIDTH}-seed1"),
    "part": lambda m, x: quarot.rotate(x, "hadamard-4", -1, 2),
    "store": lambda m, x: stored(x, 8),
    "linear": lambda m, x: m.a(x),
    "gain": lambda m, x: x * m.gain,
    "pairs": lambda m, x: turned_pairs(x),
    "swap": lambda m, x: x.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2),
    "branch": lambda m, x: x + m.b(x).sin(),
    "sum": lambda m, x: x + x.sum(-1, keepdim=True),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=7))
def test_any_program_computes_the_same(steps):
    def forward(m, x):
        for step in steps:
            x = STEPS[step](m, x)
        return m.c(x)

    module = Lambda(forward, a=linear(WIDTH), b=linear(WIDTH), c=linear(4), gain=(WIDTH,))
    _, given = planned(module, tokens(), wanted="abc")
    taken = sum(step in ("rotate", "undo", "other") for step in steps)
    assert len(given) == taken
