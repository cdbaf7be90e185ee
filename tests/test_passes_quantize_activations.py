import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, apply, captured, check_code, ids, linear, reasons, rewritten, targets, tokens

from quarot_fx.config import QuarotConfig
from quarot_fx.errors import GroupSizeError
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights

HEAD = "it is the output head: its result is the model's output; name it in overrides to quantise it"


def test_inputs_of_linears_are_quantised_once_each():
    program = captured(Decoder(), ids())
    result, report = apply(QuantizeActivations(), program, ids())
    assert (report.matched, reasons(report)) == (7, [HEAD])
    # query, key and value share theirs; so do gate and up
    check_code(result).check_count("quarot.quantize_symmetric", 4, exactly=True).run()
    assert targets(result).count("dequantize") == 4


def test_asymmetric_codes_have_a_zero():
    config = QuarotConfig(a_sym=False, a_bits=8)
    result, _ = apply(QuantizeActivations(config), captured(Decoder(), ids()), ids())
    assert "quantize_symmetric" not in targets(result)
    dequantize = [node for node in result.graph.nodes if str(node.target) == "quarot.dequantize.default"]
    assert all(node.args[2] is not None for node in dequantize)


@pytest.mark.parametrize("group", [None, 4])
def test_more_bits_are_closer(group):
    program = captured(Lambda(lambda m, x: m.a(x) * 2, a=linear(12)), tokens())
    expected = program.graph_module(tokens())[0]

    def error(bits):
        config = QuarotConfig(a_bits=bits, a_clip=1.0, a_group=group)
        result, _ = apply(QuantizeActivations(config), program, tokens())
        return float(((result.graph_module(tokens())[0] - expected).norm() / expected.norm()).detach())

    errors = [error(bits) for bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_different_schemes_for_one_input_are_two_quantisations():
    config = QuarotConfig(overrides={"b": {"a_bits": 8}, "c": "skip"})
    module = Lambda(lambda m, x: m.a(x) * m.b(x) * m.c(x), a=linear(4), b=linear(4), c=linear(4))
    result, report = apply(QuantizeActivations(config), captured(module, tokens()), tokens())
    assert report.matched == 2
    assert reasons(report) == ["a_bits=16 asks to leave its input alone"]
    bits = [node.args[1] for node in result.graph.nodes if "quantize_symmetric" in str(node.target)]
    assert sorted(bits) == [4, 8]


def test_other_readers_see_the_exact_activation():
    module = Lambda(lambda m, x: m.a(x) + x, a=linear(WIDTH))
    result, _ = apply(QuantizeActivations(), captured(module, tokens()), tokens())
    check_code(result).check("aten.linear.default(dequantize").check("aten.add.Tensor(linear, arg").run()


def test_works_after_weights_are_quantised():
    program = rewritten(captured(Decoder(), ids()), QuantizeWeights())
    _, report = apply(QuantizeActivations(), program, ids())
    assert report.matched == 7


def test_group_that_does_not_divide():
    with pytest.raises(GroupSizeError, match=r"a_group=5 does not divide the 16 elements that input of block.query"):
        QuantizeActivations(QuarotConfig(a_group=5))(captured(Decoder(), ids()))


def test_output_head_is_quantised_if_it_is_named():
    config = QuarotConfig(overrides={"head": {"a_bits": 8}})
    _, report = apply(QuantizeActivations(config), captured(Decoder(), ids()), ids())
    assert (report.matched, report.declined) == (8, [])


def test_result_keeps_its_type():
    module = Lambda(lambda m, x: m.a(x) * 2, a=linear(4)).bfloat16()
    result, _ = apply(QuantizeActivations(), captured(module, tokens().bfloat16()), tokens().bfloat16())
    assert result.graph_module(tokens().bfloat16())[0].dtype == torch.bfloat16
