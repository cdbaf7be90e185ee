import pytest
import torch
from graphs import (
    SPELLINGS,
    WHY_NOT_FUSED,
    WIDTH,
    Lambda,
    apply,
    exported,
    fill,
    linear,
    node_named,
    operand_of,
    reasons,
    rewritten,
    targets,
    tokens,
)
from torch.nn import functional as F
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.graph import FROZEN
from quarot_fx.inspection import capture_one_graph
from quarot_fx.linear_like import LAYERS
from quarot_fx.ops.activations import ACTIVATIONS
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fuse_gates import FuseGates
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.fuse_rotations import FuseRotations
from quarot_fx.passes.merge_int_linears import MergeIntLinears
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.store import WeightStore

FUSED, REFERENCE = "quarot.gated_int_linear.default", QuarotConfig(kernels="reference")
ROWS = 24


def module(function, bias=False, rows=ROWS, dtype=torch.float32):
    """Layers a, the gate in most tests, b and c of one width."""
    return fill(Lambda(function, **{name: linear(rows, bias=bias) for name in "abc"})).to(dtype)


def products(program, **options):
    """Turn the layers of a program into products of codes."""
    config = QuarotConfig(kernels="reference", **options)
    return rewritten(program, QuantizeWeights(config), QuantizeActivations(config), FuseIntLinears(config))


def fused(function, *inputs, bias=False, rows=ROWS, dtype=torch.float32, **options):
    """Fuse, and check that the result is the same but for rounding of what was between."""
    layers, inputs = module(function, bias, rows, dtype), [x.to(dtype) for x in inputs or [tokens()]]
    graph, arguments = capture_one_graph(layers, inputs)
    program = products(graph.bind(arguments, WeightStore()), **options)
    result, report = apply(FuseGates(REFERENCE), program, *inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    expected = program.graph_module(*inputs)
    assert_close(
        result.graph_module(*inputs), expected, rtol=tolerance, atol=tolerance * expected[0].abs().max().item()
    )
    return result, report


# -- what is fused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"identity"}))
def test_activations(name, dtype):
    activate = ACTIVATIONS[name]
    for forward in (
        lambda m, x: activate(m.a(x)) * m.b(x),
        lambda m, x: m.b(x) * activate(m.a(x)),
        lambda m, x: m.b(x) * activate(m.a(x).float()).to(x.dtype),
        lambda m, x: (activate(m.a(x).float()) * m.b(x).float()).to(x.dtype),
    ):
        result, report = fused(forward, dtype=dtype)
        assert (report.matched, report.declined) == (1, [])
        folded = [name for name in targets(FoldConstants()(result)) if name != "to"]
        assert folded == ["quantize_activation", "gated_int_linear"]
        assert node_named(result, FUSED).args[-2:] == (dtype, name)
        assert [layer.parameter for layer in node_named(result, FUSED).meta[LAYERS]] == ["a.weight", "b.weight"]


@pytest.mark.parametrize(("name", "function"), SPELLINGS)
def test_activations_in_every_spelling(name, function):
    result, report = fused(lambda m, x: function(m.a(x)) * m.b(x))
    assert (report.matched, report.declined) == (1, [])
    assert node_named(result, FUSED).args[-1] == name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"w_bits": 8, "a_bits": 8},
        {"w_sym": False},
        {"w_sym": False, "a_sym": False, "w_bits": 8},
        {"w_group": 4, "a_sym": False},
        {"w_group": 8, "a_group": 8},
    ],
)
def test_every_scheme(options, bias):
    result, report = fused(lambda m, x: F.silu(m.a(x)) * m.b(x), bias=bias, **options)
    assert (report.matched, report.declined) == (1, [])
    assert (node_named(result, FUSED).args[9] is not None) == bias


def test_a_result_that_several_read():
    result, report = fused(lambda m, x: ((y := F.silu(m.a(x)) * m.b(x)).relu(), y + 1))
    assert report.matched == 1
    assert targets(FoldConstants()(result))[-3:] == ["gated_int_linear", "relu", "add"]


def test_other_products_of_the_activation_are_merged_without_it():
    def forward(m, x):
        return F.silu(m.a(x)) * m.b(x) + m.c(x).relu() + m.d(x).relu()

    layers = Lambda(forward, **{name: linear(ROWS) for name in "abcd"})
    program = products(exported(layers, tokens()))
    result = rewritten(program, FuseGates(REFERENCE), MergeIntLinears(REFERENCE))
    assert [report.matched for report in result.reports[-2:]] == [1, 1]
    assert (targets(result).count("int_linear"), targets(result).count("gated_int_linear")) == (1, 1)
    assert_close(result.graph_module(tokens()), program.graph_module(tokens()), rtol=1e-5, atol=1e-4)


def test_the_rotation_after_it_has_no_gate():
    def forward(m, x):
        return operand_of(torch.ops.quarot.rotate(F.silu(m.a(x)) * m.b(x), f"hadamard-{ROWS}"))

    program = products(exported(Lambda(forward, a=linear(ROWS), b=linear(ROWS)), tokens()))
    result = rewritten(program, FuseGates(REFERENCE), FuseRotations(REFERENCE))
    rotation = node_named(result, "quarot.rotate_quantize.default")
    assert rotation.args[:3] == (node_named(result, FUSED), None, "identity")


# -- what is not -----------------------------------------------------------------------------------

OTHER_READER = "int_linear_default is also read by aten.add.Tensor add, and has to be stored for it anyway"
DECLINED = {
    "aten.linear.default linear is no product of codes": (lambda m, x: F.silu(m.a(x)) * m.b(x), {"a": {"w_bits": 16}}),
    "aten.linear.default linear_1 is no product of codes": (
        lambda m, x: F.silu(m.a(x)) * m.b(x),
        {"b": {"w_bits": 16}},
    ),
    "aten.clamp.default clamp is no product of codes": (lambda m, x: F.silu(m.a(x)) * m.b(x).clamp(-1, 1), {}),
    OTHER_READER: (lambda m, x: F.silu(y := m.a(x)) * m.b(x) * (y + 1), {}),
    OTHER_READER.replace("default", "default_1"): (lambda m, x: F.silu(m.a(x)) * (y := m.b(x)) * (y + 1), {}),
    "something is added to int_linear_default before": (
        lambda m, x: F.silu(m.a(x) + x.repeat(1, 1, 2)[..., :ROWS]) * m.b(x),
        {},
    ),
    "gate and up are products of different activations": (lambda m, x: F.silu(m.a(x)) * m.b(x.relu()), {}),
    "the weights of gate and up are stored in different ways": (
        lambda m, x: F.silu(m.a(x)) * m.b(x),
        {"b": {"w_bits": 8}},
    ),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_declined_is_named(reason):
    forward, overrides = DECLINED[reason]
    result, report = fused(forward, overrides=overrides)
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "gated_int_linear" not in targets(result)


def test_rows_that_do_not_fit():
    _, report = fused(lambda m, x: F.silu(m.a(x)) * m.b(x), rows=12)
    assert reasons(report) == ["the kernel takes 8 rows of gate and up in turn, which do not divide 12"]


def test_a_result_that_is_changed_in_place():
    program = products(exported(module(lambda m, x: F.silu(m.a(x)) * m.b(x)), tokens()))
    node_named(program, "aten.mul.Tensor").meta[FROZEN] = "it is sorted"
    _, report = apply(FuseGates(REFERENCE), program, tokens())
    assert (report.matched, reasons(report)) == (0, ["the result is changed in place: it is sorted"])


NOT_GATED = {
    "ungated": lambda m, x: F.silu(m.a(x)),
    "ungated, written out": lambda m, x: (y := m.a(x)) * torch.sigmoid(y),
    "without an activation": lambda m, x: m.a(x) * m.b(x),
    "one gate for each row": lambda m, x: torch.sigmoid(x[..., :1]) * m.a(x),
    "ungated, no activation of the op": lambda m, x: (y := m.a(x)) * torch.sigmoid(1.702 * y),
    "no products": lambda m, x: F.silu(x) * x.exp() + m.a(x).mean(),
}


@pytest.mark.parametrize("case", NOT_GATED)
def test_what_is_no_gate(case):
    result, report = fused(NOT_GATED[case])
    assert (report.matched, report.declined) == (0, [])
    assert "gated_int_linear" not in targets(result)


# -- options, sizes and graphs ---------------------------------------------------------------------


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    program = products(exported(module(lambda m, x: F.silu(m.a(x)) * m.b(x)), tokens()))
    result, report = apply(FuseGates(QuarotConfig(kernels=kernels)), program, tokens())
    assert (report.matched, reasons(report)) == (0, [reason])
    assert targets(result) == targets(program)


def test_dynamic_sizes():
    program = products(exported(module(lambda m, x: F.silu(m.a(x)) * m.b(x)), tokens(), dynamic=(0, 1)))
    result, report = apply(FuseGates(REFERENCE), program, tokens())
    assert report.matched == 1
    for shape in ((2, 3, WIDTH), (1, 7, WIDTH)):
        x = tokens(*shape)
        assert_close(result.graph_module(x), program.graph_module(x), rtol=1e-5, atol=1e-4)


def test_a_prompt_and_a_decoded_token_share_the_weight():
    layers, store = module(lambda m, x: F.silu(m.a(x)) * m.b(x), bias=True), WeightStore()
    stored = []
    for length in (7, 1):
        graph, arguments = capture_one_graph(layers, (tokens(1, length, WIDTH),))
        result = rewritten(products(graph.bind(arguments, store)), FuseGates(REFERENCE), FoldConstants())
        parts = [node for node in node_named(result, FUSED).args[4:] if isinstance(node, torch.fx.Node)]
        stored.append([getattr(result.graph_module, part.target) for part in parts])
    assert len(stored[0]) == 3  # codes, scale, bias
    assert all(one is other for one, other in zip(*stored, strict=True))
