"""The minimum cut on networks small enough to solve by hand."""

from math import log2

import torch
from graphs import WIDTH, Lambda, captured, linear, tokens
from torch.nn import functional as F

from quarot_fx.basis.analysis import Analysis
from quarot_fx.basis.cut import IF_FREE, REQUIRED, Want, cheapest_bases, transform_cost
from quarot_fx.linear_like import linear_likes


def solved(module, *inputs, worth=REQUIRED):
    """Solve with every linear's input wanted; ``worth`` may be a dict by parameter, with 0 for no want."""
    program = captured(module, *inputs)
    analysis = Analysis(program.graph)
    wants = {}
    for layer in linear_likes(program.graph):
        value = worth if isinstance(worth, int) else worth[layer.parameter]
        axis = analysis.uses[layer.node, layer.spelling.x].axis(-1)
        wants[layer.parameter] = [Want(position, value) for _, position in analysis.positions(axis)] if value else []
    cuts = cheapest_bases(analysis, [want for found in wants.values() for want in found])
    return cuts, {name: [want.position for want in found] for name, found in wants.items()}


def online(cuts):
    return [c for cut in cuts for c in cut.crossings if not c.position.tensor.constant]


def test_weights_absorb_what_they_can():
    """Between two linear layers, nothing runs online."""
    cuts, wants = solved(Lambda(lambda m, x: m.b(m.a(x)), a=linear(12), b=linear(4, 12)), tokens(), worth={
        "a.weight": 0, "b.weight": REQUIRED,
    })  # fmt: skip
    (cut,) = cuts
    assert (cut.size, cut.is_online, cut.unmet) == (12, False, {})
    assert wants["b.weight"][0] in cut.rotated
    assert [c.position.tensor.node.meta["parameter"] for c in cut.crossings] == ["a.weight", "b.weight"]


def test_nonlinearity_takes_one_transform():
    cuts, wants = solved(Lambda(lambda m, x: m.b(F.silu(m.a(x))), a=linear(12), b=linear(4, 12)), tokens(), worth={
        "a.weight": 0, "b.weight": REQUIRED,
    })  # fmt: skip
    (crossing,) = online(cuts)
    assert (crossing.position.tensor.node.target, crossing.inverse) == (torch.ops.aten.silu.default, False)
    assert "aten.silu" in crossing.why
    assert [position.tensor for position in crossing.uses] == [wants["b.weight"][0].tensor]


def test_users_of_a_tensor_share_its_transform():
    module = Lambda(lambda m, x: m.a(y := F.silu(x)) * m.b(y) * m.c(y), a=linear(4), b=linear(4), c=linear(4))
    cuts, _ = solved(module, tokens())
    (crossing,) = online(cuts)
    assert len(crossing.uses) == 3


def test_the_cheaper_side_of_a_repetition_is_cut():
    """Keys are rotated before their heads are repeated, not after."""
    module = Lambda(lambda m, x: m.b(F.silu(x)[:, :, None].expand(-1, -1, 5, -1)), b=linear(4))
    (crossing,) = online(solved(module, tokens())[0])
    assert crossing.position.tensor.numel == tokens().numel()


def test_a_tie_is_cut_late():
    """What must share a basis with two nonlinear branches is transformed once, after their sum."""
    module = Lambda(lambda m, x: m.b(F.silu(x) + F.relu(x)), b=linear(4))
    (crossing,) = online(solved(module, tokens())[0])
    assert str(crossing.position.tensor.node.target) == "aten.add.Tensor"


def test_a_residual_stream_that_an_output_reads_is_transformed_back():
    """One inverse transform before the output costs less than one at each of two readers of different tensors."""

    def forward(m, x):
        h = m.a(x)
        return m.b(h) + m.c(h + m.d(x)), h[:, :1]

    module = Lambda(forward, **{name: linear(WIDTH) for name in "abcd"})
    worth = {"a.weight": 0, "d.weight": 0, "b.weight": REQUIRED, "c.weight": REQUIRED}
    (crossing,) = online(solved(module, tokens(), worth=worth)[0])
    assert crossing.inverse
    assert str(crossing.position.tensor.node.target) == "aten.slice.Tensor"
    assert "is an output of the graph" in crossing.why


def test_if_free_is_taken_where_it_is_free():
    module = Lambda(lambda m, x: m.b(m.a(x)), a=linear(12), b=linear(4, 12))
    cuts, wants = solved(module, tokens(), worth={"a.weight": 0, "b.weight": IF_FREE})
    assert wants["b.weight"][0] in cuts[0].rotated


def test_if_free_is_not_paid_for():
    module = Lambda(lambda m, x: m.b(F.silu(m.a(x))), a=linear(12), b=linear(4, 12))
    cuts, wants = solved(module, tokens(), worth={"a.weight": 0, "b.weight": IF_FREE})
    (cut,) = cuts
    assert (cut.crossings, cut.rotated) == ([], set())
    ((position, why),) = cut.unmet.items()
    assert position == wants["b.weight"][0]
    assert "aten.silu" in why


def test_many_that_want_it_for_free_do_not_pay_together():
    module = Lambda(
        lambda m, x: sum(getattr(m, name)(F.silu(x[:1, :1])) for name in "abc"), **{n: linear(4) for n in "abc"}
    )
    cuts, _ = solved(module, tokens(), worth=IF_FREE)
    assert online(cuts) == []


def test_who_pays_serves_those_who_do_not():
    module = Lambda(lambda m, x: m.a(y := F.silu(x)) + m.b(y), a=linear(4), b=linear(4))
    cuts, wants = solved(module, tokens(), worth={"a.weight": REQUIRED, "b.weight": IF_FREE})
    assert wants["b.weight"][0] in cuts[0].rotated
    assert len(online(cuts)) == 1


def test_what_an_operator_pins_cannot_be_rotated_at_any_price():
    """The axis is summed over, in the same place where it is wanted."""
    module = Lambda(lambda m, x: m.a(x).sum(-1), a=linear(4))
    program = captured(module, tokens())
    analysis = Analysis(program.graph)
    (total,) = [node for node in program.graph.nodes if str(node.target) == "aten.sum.dim_IntList"]
    ((_, position),) = analysis.positions(analysis.uses[total, 0].axis(-1))
    (cut,) = cheapest_bases(analysis, [Want(position, REQUIRED)])
    assert list(cut.unmet) == [position]
    assert "sums along this axis" in cut.unmet[position]


def test_factors_of_an_axis_are_solved_apart():
    """Of heads x head_dim, only head_dim passes: heads are softmaxed over."""

    def forward(m, x):
        heads = m.a(x).view(2, 3, 4, 4)
        return m.b((torch.softmax(m.c(x)[..., None], 2) * heads).flatten(2))

    module = Lambda(forward, a=linear(16), b=linear(4), c=linear(4))
    cuts, wants = solved(module, tokens(), worth={"a.weight": 0, "c.weight": 0, "b.weight": REQUIRED})
    assert [(cut.size, cut.is_online) for cut in cuts] == [(4, True), (4, False)]
    assert all(position in cut.rotated for position, cut in zip(wants["b.weight"], cuts, strict=True))


def test_no_wants_no_cuts():
    assert solved(Lambda(lambda m, x: m.a(x), a=linear(4)), tokens(), worth=0)[0] == []


def test_cost_is_elements_times_logarithm():
    assert transform_cost(1000, 8) == 16 * 1000 * log2(8)
    assert transform_cost(1, 2) > IF_FREE
    assert transform_cost(2, 1) > IF_FREE, "nothing is cheaper than free"


def test_symbolic_sizes_leave_known_axes_free():
    """Batch and tokens are unknown; a view splits a known axis behind them."""

    def forward(m, x):
        y = m.a(x)
        return m.b(
            y.view(y.shape[0], y.shape[1], 4, 4).transpose(1, 2).transpose(1, 2).reshape(y.shape[0], y.shape[1], 16)
        )

    program = dynamic(Lambda(forward, a=linear(16), b=linear(4)), tokens())
    analysis = Analysis(program.graph)
    *_, last = linear_likes(program.graph)
    axis = analysis.uses[last.node, 0].axis(-1)
    assert [analysis.factors.size(leaf) for leaf in analysis.leaves(axis)] == [4, 4]
    cuts = cheapest_bases(analysis, [Want(position, REQUIRED) for _, position in analysis.positions(axis)])
    assert [cut.is_online for cut in cuts] == [False, False]
    assert analysis.leaves(analysis.uses[last.node, 0].axis(0)) == [], "nothing can be said of a symbolic size"


def test_symbolic_size_merged_with_a_known_one_is_pinned():
    def forward(m, x):
        y = m.a(x)
        return m.b(y.view(y.shape[0], -1, 4)) + 0  # tokens and half of the axis are merged

    program = dynamic(Lambda(forward, a=linear(16), b=linear(8, 4)), tokens())
    analysis = Analysis(program.graph)
    *_, last = linear_likes(program.graph)
    axis = analysis.uses[last.node, 0].axis(-1)
    cuts = cheapest_bases(analysis, [Want(position, REQUIRED) for _, position in analysis.positions(axis)])
    (cut,) = cuts
    assert cut.is_online
    assert all(
        "regroups sizes that do not nest" in crossing.why
        for crossing in cut.crossings
        if not crossing.position.tensor.constant
    )


def test_symbolic_sizes_flattened_and_restored():
    """``x.view(-1, width)`` and back, as Conv1D does: the last axis keeps its factor."""

    def forward(m, x):
        flat = m.a(x).view(-1, 16)
        return m.b(flat.view(x.shape[0], x.shape[1], 16))

    program = dynamic(Lambda(forward, a=linear(16), b=linear(4)), tokens())
    analysis = Analysis(program.graph)
    first, last = linear_likes(program.graph)
    read = analysis.uses[last.node, 0].axis(-1)
    written = analysis.results[first.node][0].axis(-1)
    assert analysis.leaves(read) == analysis.leaves(written) != []


def dynamic(module, x):
    """Export with all axes but the last symbolic."""
    from graphs import fill

    from quarot_fx.program import Program

    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(fill(module), (x,), dynamic_shapes=(sizes,))
    return Program.of(exported.module(check_guards=False))
