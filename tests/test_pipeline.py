from dataclasses import dataclass

import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, captured, fill, ids, linear, targets, tokens

import quarot_fx
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import CheckError, PipelineError, UnknownOptionError
from quarot_fx.graph import replace_arguments
from quarot_fx.passes.base import Pass, pass_name
from quarot_fx.passes.fold_biases import FoldBiases
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.pipeline import DEFAULT_ORDER, PASSES, build_pipeline, check_order, parse_pipeline, run_pipeline
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.passes.recognize_norms import RecognizeNorms
from quarot_fx.passes.rotate import Rotate

CONFIG = QuarotConfig()
NAMES = [pass_name(cls) for cls in DEFAULT_ORDER]


def names(passes):
    return [one.name for one in passes]


# -- as text ---------------------------------------------------------------------------------------


def test_the_default_pipeline_has_all_passes():
    assert names(build_pipeline(CONFIG)) == NAMES == list(PASSES)
    assert NAMES[0] == "recognize-norms"
    assert NAMES[-1] == "fold-constants"


@pytest.mark.parametrize("text", ["fold-gains,rotate", " fold-gains , rotate ", "fold-gains,\n  rotate"])
def test_text(text):
    assert names(parse_pipeline(text, CONFIG)) == ["fold-gains", "rotate"]


def test_options_in_braces_hold_for_their_pass_only():
    text = "place-rotations{seed=3 rotation=random}, rotate, quantize-weights{w_bits=8 w_sym=False w_clip=0.9}"
    place, rotate, quantize = parse_pipeline(text, QuarotConfig(w_bits=6))
    assert (place.config.seed, place.config.rotation, place.config.w_bits) == (3, "random", 6)
    assert rotate.config == QuarotConfig(w_bits=6)
    assert (quantize.config.w_bits, quantize.config.w_sym, quantize.config.w_clip) == (8, False, 0.9)


def test_empty_braces():
    assert parse_pipeline("rotate{}", CONFIG) == [Rotate(CONFIG)]


def test_one_pass_twice():
    assert names(parse_pipeline("fold-gains,fold-gains", CONFIG)) == ["fold-gains", "fold-gains"]


@pytest.mark.parametrize(
    "text", ["", ",", "rotate,", "rotate;rotate", "rotate{seed=1", "rotate}", "rotate rotate", "{seed=1}"]
)
def test_text_that_cannot_be_read(text):
    with pytest.raises(PipelineError, match=r'write it as "pass,pass\{option=value option=value\},pass"'):
        parse_pipeline(text, CONFIG)


def test_unknown_pass_gets_the_nearest_name():
    with pytest.raises(UnknownOptionError, match=r"unknown pass 'fold-gain'. Did you mean 'fold-gains'\?"):
        parse_pipeline("recognize-norms,fold-gain", CONFIG)


def test_unknown_option_gets_the_nearest_name():
    with pytest.raises(UnknownOptionError, match=r"unknown option 'w_bit'. Did you mean 'w_bits'\?"):
        parse_pipeline("quantize-weights{w_bit=8}", CONFIG)


def test_option_that_is_out_of_range():
    with pytest.raises(quarot_fx.QuarotError, match="w_bits=9: must be 2 to 8"):
        parse_pipeline("quantize-weights{w_bits=9}", CONFIG)


# -- from options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", NAMES)
def test_stop_after(last):
    expected = NAMES[: NAMES.index(last) + 1]
    if last != "fold-constants":
        expected = [*expected, "fold-constants"]  # what was rewritten is always computed
    assert names(build_pipeline(QuarotConfig(stop_after=last))) == expected


def test_stop_after_ends_a_pipeline_of_ones_own():
    config = QuarotConfig(pipeline="recognize-norms,fold-gains,place-rotations,rotate", stop_after="fold-gains")
    assert names(build_pipeline(config)) == ["recognize-norms", "fold-gains", "fold-constants"]


def test_stop_after_a_pass_that_is_not_there():
    config = QuarotConfig(pipeline="fold-gains", stop_after="rotate")
    with pytest.raises(PipelineError, match="stop_after='rotate' is not in it"):
        build_pipeline(config)


@pytest.mark.parametrize(
    "options", [{"stop_after": "rotatte"}, {"disabled_passes": ("rotatte",)}, {"disabled_passes": "rotatte"}]
)
def test_unknown_names_in_options(options):
    with pytest.raises(UnknownOptionError, match=r"unknown pass 'rotatte'. Did you mean 'rotate'\?"):
        build_pipeline(QuarotConfig(**options))


def test_disabled_passes():
    config = QuarotConfig(disabled_passes=("quantize-caches", "fold-means"))
    assert names(build_pipeline(config)) == [name for name in NAMES if name not in config.disabled_passes]


def test_constants_are_folded_last_wherever_they_are_asked_for():
    config = QuarotConfig(pipeline="fold-constants,recognize-norms,fold-gains")
    assert names(build_pipeline(config)) == ["recognize-norms", "fold-gains", "fold-constants"]


def test_options_reach_every_pass():
    config = QuarotConfig(w_bits=3)
    assert all(one.config == config for one in build_pipeline(config))


# -- order -----------------------------------------------------------------------------------------


def test_order():
    with pytest.raises(PipelineError, match="fold-gains must come after recognize-norms"):
        build_pipeline(QuarotConfig(pipeline="fold-gains,recognize-norms"))
    with pytest.raises(PipelineError, match="rotate must come after place-rotations"):
        check_order([Rotate(), PlaceRotations()])


def test_what_is_required_may_be_left_out_or_repeated():
    check_order([FoldGains(), PlaceRotations()])
    check_order([RecognizeNorms(), FoldGains(), RecognizeNorms()])


@pytest.mark.parametrize("cls", DEFAULT_ORDER)
def test_required_passes_exist_and_come_before(cls):
    assert all(NAMES.index(required) < NAMES.index(cls().name) for required in cls.requires)


# -- running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundBiases(Pass):
    """``b -> 0``: a user's pass that claims to change nothing."""

    def run(self, program, report):
        for node in program.graph.nodes:
            if str(node.target) == "aten.linear.default" and len(node.args) == 3:
                node.args = node.args[:2]
                report.matched += 1


@dataclass(frozen=True)
class SwapOperands(Pass):
    """``a + b -> b + a``: one that is right."""

    def run(self, program, report):
        for node in program.graph.nodes:
            if str(node.target) == "aten.add.Tensor":
                first, second = node.all_input_nodes
                replace_arguments(node, {0: second, 1: first})
                report.matched += 1


@pytest.fixture
def program():
    module = Lambda(lambda m, x: m.b(torch.relu(m.a(x) + m.a(x * 2))), a=linear(12, bias=True), b=linear(4, 12))
    return captured(module, tokens())


def test_pipeline_works_on_a_copy(program):
    code = program.graph_module.code
    result = run_pipeline(program, build_pipeline(CONFIG))
    assert program.graph_module.code == code
    assert (program.reports, program.plan) == ([], None)
    assert names(result.reports) == NAMES
    assert result.plan is not None


def test_a_pass_of_ones_own_between_ours(program):
    result = run_pipeline(program, [FoldBiases(), SwapOperands(), PlaceRotations(), Rotate()], [tokens()])
    assert names(result.reports) == ["fold-biases", "swap-operands", "place-rotations", "rotate"]
    assert result.reports[1].matched == 1
    assert all(report.difference < 1e-9 for report in result.reports)


def test_check_names_the_stage_that_broke(program):
    with pytest.raises(CheckError, match="the stage 'round-biases' changed the output") as raised:
        run_pipeline(program, [FoldBiases(), RoundBiases(), PlaceRotations(), Rotate()], [tokens()])
    assert (raised.value.stage, raised.value.limit) == ("round-biases", 1e-9)
    assert raised.value.before == "stop_after='fold-biases'", "what rewrite takes to stop there"
    assert raised.value.difference > 1e-3


def test_check_before_the_first_pass_names_the_capture(program):
    with pytest.raises(CheckError) as raised:
        run_pipeline(program, [RoundBiases()], [tokens()])
    assert raised.value.before == "pipeline='fold-constants'", "which changes nothing"


def test_check_lets_nan_through_nowhere(program):
    @dataclass(frozen=True)
    class MakeNan(Pass):
        """``x -> x / 0``."""

        def run(self, program, report):
            (node,) = [n for n in program.graph.nodes if str(n.target) == "aten.relu.default"]
            with program.graph.inserting_after(node):
                new = program.graph.call_function(torch.ops.aten.log.default, (node,))
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    with pytest.raises(CheckError, match="make-nan"):
        run_pipeline(program, [MakeNan()], [tokens() * 0 - 1])


def test_without_check_nothing_is_compared(program):
    result = run_pipeline(program, [RoundBiases()])
    assert result.reports[0].difference is None


def test_quantisation_may_change_the_output_and_is_measured(program):
    result = run_pipeline(program, [QuantizeWeights()], [tokens()])
    assert 1e-4 < result.reports[0].difference < 1


def test_reports_count_nodes(program):
    result = run_pipeline(program, [QuantizeWeights()])
    (report,) = result.reports
    assert report.nodes_before == len(program.graph.nodes)
    assert report.nodes_after == len(result.graph.nodes)
    assert report.seconds > 0


# -- through the public functions ------------------------------------------------------------------


def test_rewrite_stops_and_reports():
    module = fill(Decoder())
    graph_module = quarot_fx.rewrite(module, ids(), stop_after="rotate", check=True)
    report = graph_module.quarot
    assert [one.name for one in report.passes] == [*NAMES[: NAMES.index("rotate") + 1], "fold-constants"]
    assert all(one.difference <= 1e-6 for one in report.passes)
    torch.testing.assert_close(graph_module(ids())[0], module(ids()), rtol=1e-4, atol=1e-4)


def test_explain_without_caches():
    report = quarot_fx.explain(fill(Decoder()), ids(), disabled_passes="quantize-caches")
    assert [cache.bits for cache in report.caches] == [16, 16]
    assert {linear.w_bits for linear in report.linears if linear.parameter != "head.weight"} == {4}


def test_pipeline_as_text_through_rewrite():
    graph_module = quarot_fx.rewrite(fill(Decoder()), ids(), pipeline="quantize-weights{w_bits=8}")
    assert graph_module.code.count("quarot.unpack") == 7
    assert "rotate" not in graph_module.code
    bits = {node.args[1] for node in graph_module.graph.nodes if str(node.target) == "quarot.unpack.default"}
    assert bits == {8}


def test_a_pass_alone_on_an_exported_graph():
    module = fill(Lambda(lambda m, x: m.a(x * m.g), g=WIDTH, a=linear(6)))
    exported = torch.export.export(module, (tokens(),)).module()
    result = FoldGains()(exported)
    assert "mul" in targets(result)  # of constants, g and the weight
    torch.testing.assert_close(result.graph_module(tokens())[0], module(tokens()))
    torch.testing.assert_close(exported(tokens()), module(tokens()))


def test_a_pass_alone_on_a_traced_graph_without_fake_values():
    module = fill(Lambda(lambda m, x: m.a(x * m.g), g=WIDTH, a=linear(6)))
    with torch.no_grad():
        graph_module = torch.fx.experimental.proxy_tensor.make_fx(module, pre_dispatch=True)(tokens())
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    result = FoldGains()(graph_module, tokens())
    assert result.reports[0].matched == 1
    torch.testing.assert_close(result.graph_module(tokens()), module(tokens()))
