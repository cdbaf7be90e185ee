import pytest
from graphs import WIDTH, Decoder, Lambda, apply, captured, ids, linear, node_named, reasons, rewritten, targets, tokens
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.merge_int_linears import MergeIntLinears
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights


def merged(module, *inputs, **options):
    config = QuarotConfig(kernels="reference", **options)
    passes = QuantizeWeights(config), QuantizeActivations(config), FuseIntLinears(config)
    program = rewritten(captured(module, *inputs), *passes)
    result, report = apply(MergeIntLinears(config), program, *inputs)
    assert_close(result.graph_module(*inputs), program.graph_module(*inputs), rtol=1e-6, atol=1e-6)
    return result, report


def three(bias=False):
    parts = {"a": linear(12, bias=bias), "b": linear(4, bias=bias), "c": linear(8, bias=bias)}
    return Lambda(lambda m, x: (m.a(x).relu(), m.b(x).relu(), m.c(x).relu()), **parts)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_one_activation_become_one(bias, symmetric):
    result, report = merged(three(bias), tokens(), w_sym=symmetric, a_sym=symmetric, w_group=4)
    assert (report.matched, report.declined) == (1, [])
    assert targets(FoldConstants()(result)) == ["quantize_activation", "int_linear", *["slice"] * 3, *["relu"] * 3]
    product = node_named(result, "quarot.int_linear.default")
    assert product.meta["val"].shape[-1] == 24
    assert [layer.parameter for layer in product.meta[LAYERS]] == ["a.weight", "b.weight", "c.weight"]


def test_a_decoder():
    result, report = merged(Decoder(), ids())
    assert (report.matched, report.declined) == (2, [])  # queries, keys, values; gate, up
    assert targets(result).count("int_linear") == 4


def test_weights_that_are_stored_otherwise_are_named():
    result, report = merged(three(), tokens(), overrides={"b": {"w_bits": 8}})
    assert report.matched == 1
    assert reasons(report) == ["no other weight of its activation is stored as its own"]
    assert targets(result).count("int_linear") == 2


def test_a_product_with_a_residual_stays():
    module = Lambda(lambda m, x: (m.a(x).relu(), m.b(x).relu(), x + m.c(x)), a=linear(12), b=linear(4), c=linear(WIDTH))
    result, report = merged(module, tokens())
    assert (report.matched, len(report.declined)) == (1, 1)
    assert targets(result).count("int_linear") == 2


def test_products_of_different_activations_stay():
    module = Lambda(lambda m, x, y: (m.a(x).relu(), m.b(y).relu()), a=linear(12), b=linear(4))
    _, report = merged(module, tokens(), tokens() + 1)
    assert (report.matched, report.declined) == (0, [])
