import pytest
import torch
from graphs import (
    WIDTH,
    Decoder,
    Lambda,
    apply,
    captured,
    check_code,
    ids,
    linear,
    node_named,
    reasons,
    tokens,
)

from quarot_fx.config import QuarotConfig
from quarot_fx.errors import GroupSizeError, NonFiniteWeightError
from quarot_fx.graph import stored_tensor
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.quantize_weights import QuantizeWeights

HEAD = "it is the output head: its result is the model's output; name it in overrides to quantise it"


def relative_error(result, program, *inputs):
    expected = program.graph_module(*inputs)[0]
    return float(((result.graph_module(*inputs)[0] - expected).norm() / expected.norm()).detach())


def test_linears_become_codes_and_scales():
    program = captured(Decoder(), ids())
    result, report = apply(QuantizeWeights(), program, ids())
    assert (report.matched, report.weights, reasons(report)) == (7, 7, [HEAD])
    assert report.declined[0].where == "head.weight"
    check_code(result).check_count("quarot.unpack", 7, exactly=True).check("head_weight").run()
    assert node_named(result, "quarot.unpack.default").args[0].target is torch.ops.quarot.pack.default
    stored = node_named(FoldConstants()(result), "quarot.unpack.default").args[0]
    assert stored.target == "block_query_weight_codes"
    assert stored_tensor(stored).dtype == torch.uint8
    assert stored_tensor(stored).shape == (WIDTH, WIDTH // 2)  # two codes a byte


def test_groups_of_64_take_four_and_a_quarter_bits_a_weight():
    program = captured(Lambda(lambda m, x: m.a(x) * 2, a=linear(128, 192)), tokens(2, 192))
    result = FoldConstants()(QuantizeWeights(QuarotConfig(w_group=64))(program))
    codes = stored_tensor(node_named(result, "quarot.unpack.default").args[0])
    scale = stored_tensor(node_named(result, "quarot.dequantize.default").args[1])
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (128, 3))
    assert 8 * (codes.nbytes + scale.nbytes) == 4.25 * 128 * 192


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 4])
def test_more_bits_are_closer(symmetric, group):
    program = captured(Lambda(lambda m, x: m.a(x) * 2, a=linear(12)), tokens())

    def error(bits):
        config = QuarotConfig(w_bits=bits, w_sym=symmetric, w_group=group)
        return relative_error(apply(QuantizeWeights(config), program, tokens())[0], program, tokens())

    errors = [error(bits) for bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


@pytest.mark.parametrize("spelling", ["addmm", "matmul", "experts"])
def test_transposed_weights(spelling):
    def forward(m, x):
        if spelling == "addmm":
            return torch.addmm(m.b, x.view(-1, WIDTH), m.w) * 2
        return (torch.bmm(x, m.experts) if spelling == "experts" else x @ m.w) * 2

    program = captured(Lambda(forward, w=(WIDTH, 12), b=12, experts=(2, WIDTH, 12)), tokens())
    result, report = apply(QuantizeWeights(QuarotConfig(w_bits=8)), program, tokens())
    assert report.matched == 1
    check_code(result).check("quarot.unpack").check("quarot.dequantize").check("aten.transpose").run()
    assert relative_error(result, program, tokens()) < 0.02


def test_overrides_by_name():
    overrides = {"block.down": {"w_bits": 8}, "block.up": "skip", "head": {"w_bits": 8}}
    result, report = apply(QuantizeWeights(QuarotConfig(overrides=overrides)), captured(Decoder(), ids()), ids())
    assert report.matched == 7
    assert [(d.where, d.reason) for d in report.declined] == [("block.up.weight", "w_bits=16 asks to leave it alone")]
    bits = [node.args[1] for node in result.graph.nodes if str(node.target) == "quarot.unpack.default"]
    assert bits == [4, 4, 4, 4, 4, 8, 8]


def test_router_is_left_alone():
    def mixture(m, x):
        weight, chosen = torch.softmax(m.router(x), -1).topk(2, -1)
        return m.a(x) * weight.sum(-1, keepdim=True) + chosen.sum()

    program = captured(Lambda(mixture, router=linear(4), a=linear(WIDTH)), tokens())
    _, report = apply(QuantizeWeights(), program, tokens())
    assert report.matched == 1
    assert reasons(report) == ["it is a router: its result is ranked; name it in overrides to quantise it"]


def test_a_second_run_finds_nothing():
    program = QuantizeWeights()(captured(Decoder(), ids()))
    _, report = apply(QuantizeWeights(), program, ids())
    assert report.matched == 0


def test_group_that_does_not_divide():
    with pytest.raises(GroupSizeError, match=r"w_group=5 does not divide the 16 elements that block.query.weight has"):
        QuantizeWeights(QuarotConfig(w_group=5))(captured(Decoder(), ids()))


def test_weight_that_is_not_finite():
    module = Lambda(lambda m, x: m.a(x) * 2, a=linear(12))
    program = captured(module, tokens())
    with torch.no_grad():
        module.a.weight[0, :2] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"parameter 'a.weight' has 2 element"):
        FoldConstants()(QuantizeWeights()(program))
