import pytest
import torch
from graphs import (
    WHY_NOT_FUSED,
    WIDTH,
    Decoder,
    Lambda,
    apply,
    captured,
    ids,
    linear,
    node_named,
    reasons,
    rewritten,
    targets,
    tokens,
)
from torch import nn
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights


def quantized(module, *inputs, **options):
    config = QuarotConfig(kernels="reference", **options)
    return rewritten(captured(module, *inputs), QuantizeWeights(config), QuantizeActivations(config)), config


def fused(module, *inputs, **options):
    """Fuse, and check that the result is that of the simulation: in float32 both round alike up to its last bits."""
    program, config = quantized(module, *inputs, **options)
    result, report = apply(FuseIntLinears(config), program, *inputs)
    assert_close(result.graph_module(*inputs), program.graph_module(*inputs), rtol=1e-5, atol=1e-5)
    return result, report


@pytest.mark.parametrize("bits", [(2, 3), (3, 2), (4, 4), (5, 6), (8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("symmetric", [(True, True), (True, False), (False, True), (False, False)])
def test_every_scheme(bits, symmetric):
    module = Lambda(lambda m, x: m.a(x) * 2, a=linear(12, bias=True))
    options = dict(zip(("w_bits", "a_bits"), bits, strict=True), w_sym=symmetric[0], a_sym=symmetric[1])
    result, report = fused(module, tokens(), **options)
    assert (report.matched, report.declined) == (1, [])
    assert targets(FoldConstants()(result)) == ["quantize_activation", "int_linear", "mul"]
    stored = node_named(result, "quarot.int_linear.default").args[4].meta["val"]
    assert stored.dtype == (torch.uint8 if bits[0] <= 4 else torch.int8)


@pytest.mark.parametrize("groups", [(None, 4), (4, None), (4, 8), (8, 4), (4, 4)])
def test_groups(groups):
    w_group, a_group = groups
    module = Lambda(lambda m, x: m.a(x) * 2, a=linear(12))
    for symmetric in (True, False):
        options = {"w_group": w_group, "a_group": a_group, "w_sym": symmetric, "a_sym": not symmetric}
        _, report = fused(module, tokens(), **options)
        assert report.matched == 1


def test_the_residual_is_added_by_the_product():
    module = Lambda(lambda m, x, y: (y + m.a(x)) * 2, a=linear(WIDTH))
    result, _ = fused(module, tokens(), tokens() + 1)
    assert "add" not in targets(result)
    product = node_named(result, "quarot.int_linear.default")
    assert product.args[10].op == "placeholder"


def test_a_residual_that_is_made_after_the_layer():
    module = Lambda(lambda m, x, y: m.a(x) + y.exp(), a=linear(WIDTH))
    result, _ = fused(module, tokens(), tokens())
    assert node_named(result, "quarot.int_linear.default").args[10] is node_named(result, "aten.exp.default")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (m.a(x) + 1) * 2,
        lambda m, x: m.a(x) + m.a(x).mean(),  # two readers
        lambda m, x: m.a(x) + x[:, :1],  # broadcast
        lambda m, x: torch.add(x, m.a(x), alpha=2),
        lambda m, x: (y := m.a(x)) + y,
    ],
)
def test_what_is_no_residual_is_added_after_it(forward):
    result, report = fused(Lambda(forward, a=linear(WIDTH)), tokens())
    assert report.matched
    assert all(n.args[10] is None for n in result.graph.nodes if str(n.target) == "quarot.int_linear.default")


def test_readers_of_one_activation_share_its_codes():
    result, report = fused(Decoder(), ids())
    assert report.matched == 7
    assert targets(result).count("int_linear") == 7
    assert targets(result).count("quantize_activation") == 4  # queries, keys and values; output; gate and up; down


def test_layers_are_remembered():
    module = Lambda(lambda m, x: m.a(x) * 2, a=linear(12))
    result, _ = fused(module, tokens(), w_bits=3, a_bits=6)
    (layer,) = node_named(result, "quarot.int_linear.default").meta[LAYERS]
    assert (layer.node, layer.parameter, layer.w_bits, layer.a_bits, layer.role) == ("linear", "a.weight", 3, 6, "")


def test_what_is_half_quantised_stays_and_is_named():
    module = Lambda(lambda m, x: m.a(x) + m.b(x), a=linear(12), b=linear(12))
    overrides = {"a": {"w_bits": 16}, "b": {"a_bits": 16}}
    result, report = fused(module, tokens(), overrides=overrides)
    assert targets(result).count("linear") == 2
    assert {d.where: d.reason for d in report.declined} == {
        "a.weight": "its weight is not quantised: kernels multiply codes by codes",
        "b.weight": "its input is not quantised: kernels multiply codes by codes",
    }


def test_experts_stay_and_are_named():
    module = Lambda(lambda m, x: torch.bmm(x, m.experts) * 2, experts=(2, WIDTH, 12))
    _, report = fused(module, tokens())
    assert reasons(report) == ["no kernel multiplies by a stack of matrices: aten.bmm.default"]


def test_no_kernels_no_fusing():
    program, _ = quantized(Lambda(lambda m, x: m.a(x) * 2, a=linear(12)), tokens())
    result, report = apply(FuseIntLinears(QuarotConfig(kernels="none")), program, tokens())
    assert targets(result) == targets(program)
    assert reasons(report) == [WHY_NOT_FUSED["none"]]


def test_no_provider_no_fusing():
    program, _ = quantized(Lambda(lambda m, x: m.a(x) * 2, a=linear(12)), tokens())
    result, report = apply(FuseIntLinears(QuarotConfig()), program, tokens())
    assert targets(result) == targets(program)
    assert reasons(report) == [WHY_NOT_FUSED["auto"]]


def test_a_weight_that_was_folded_already():
    program, config = quantized(Lambda(lambda m, x: m.a(x) * 2, a=linear(12)), tokens())
    before = FoldConstants()(program)
    result, report = apply(FuseIntLinears(config), before, tokens())
    assert report.matched == 1
    assert_close(result.graph_module(tokens()), program.graph_module(tokens()))


def test_dynamic_sizes():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = linear(WIDTH)

        def forward(self, x):
            return (x + self.a(x)) * 2

    module = Module().eval()
    exported = torch.export.export(
        module, (tokens(),), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    )
    config = QuarotConfig(kernels="reference")
    program = rewritten(QuantizeWeights(config)(exported), QuantizeActivations(config))
    result = FuseIntLinears(config)(program)
    assert node_named(result, "quarot.int_linear.default").args[10].op == "placeholder"
    for shape in ((2, 3, WIDTH), (1, 7, WIDTH)):
        assert_close(result.graph_module(tokens(*shape)), program.graph_module(tokens(*shape)), rtol=1e-5, atol=1e-5)
