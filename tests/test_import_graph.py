"""Graphs as input: exported programs, FX graphs before and after dispatch, torch-level graphs, Dynamo's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from decoders import STYLES, logits
from graphs import Decoder, Lambda, captured, fill, linear, rms_norm, tokens
from models import random_token_ids
from torch.fx.experimental.proxy_tensor import make_fx

import quarot_fx
from quarot_fx.errors import CaptureError, GraphInputError, TrainingModeError
from quarot_fx.float64 import relative_difference
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.recognize_norms import RecognizeNorms
from quarot_fx.program import Program

BY_NAME = {style.name: style for style in STYLES}
IDS = random_token_ids(batch=2)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def exported(model, kwargs):
    return torch.export.export(model, (), kwargs)


FORMS = {
    "exported": exported,
    "module": lambda model, kwargs: exported(model, kwargs).module(),
    "decomposed": lambda model, kwargs: exported(model, kwargs).run_decompositions(),
    "make_fx_pre_dispatch": lambda model, kwargs: make_fx(model, pre_dispatch=True)(*kwargs.values()),
    "make_fx": lambda model, kwargs: make_fx(model)(*kwargs.values()),
}


def outcome(report):
    """What of a report does not depend on names and spellings."""
    linears = Counter((record.w_bits, record.a_bits, record.rotated) for record in report.linears)
    caches = Counter((record.kind, record.bits) for record in report.caches)
    rotations = Counter(transform.rotation for transform in report.plan.online)
    return linears, caches, rotations, report.plan.barriers


@pytest.fixture(scope="module")
def reference():
    """By style: what eager says, and what becomes of the model by way of Dynamo."""
    known = {}

    def of(name):
        if name not in known:
            style = BY_NAME[name]
            inputs = style.inputs(IDS, 0)
            known[name] = logits(style.build()(**inputs)), outcome(quarot_fx.rewrite(style.build(), inputs).quarot)
        return known[name]

    return of


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["nanogpt", "gpt_fast", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama2c", "torchtune"))]
)
def test_graph_is_rewritten_like_the_model(name, form, reference):
    style = BY_NAME[name]
    inputs = style.inputs(IDS, 0)
    expected, expected_outcome = reference(name)
    graph = FORMS[form](style.build(), inputs)
    if "make_fx" in form:  # which forgets the names of arguments and of parameters
        inputs = tuple(inputs.values())
    result = quarot_fx.rewrite(graph, inputs, stop_after="rotate")(*style.inputs(IDS, 0).values())
    assert relative_difference([logits(result)], [expected]) < 1e-4
    report = quarot_fx.rewrite(graph, inputs).quarot
    assert outcome(report) == expected_outcome
    if "make_fx" not in form:
        names = {record.parameter for record in report.linears}
        assert names <= {name for name, _ in style.build().named_parameters(remove_duplicate=False)}


def test_parameters_have_the_names_that_overrides_ask_for():
    style = BY_NAME["llama2c"]
    program = exported(style.build(), style.inputs(IDS, 0))
    report = quarot_fx.rewrite(program, overrides={"layers.1.*.w2": {"w_bits": 8}}).quarot
    bits = {record.parameter: record.w_bits for record in report.linears}
    assert bits["layers.0.feed_forward.w2.weight"] == 4
    assert bits["layers.1.feed_forward.w2.weight"] == 8


@pytest.mark.parametrize("form", ["exported", "module"])
def test_dynamic_shapes_stay_dynamic(form):
    model = fill(Decoder())
    dynamic = {"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(model, (IDS % 16,), dynamic_shapes=dynamic)
    gm = quarot_fx.rewrite(program if form == "exported" else program.module(), stop_after="rotate")
    for shape in (1, 5), (3, 9):
        ids = torch.randint(16, shape)
        assert relative_difference([gm(ids)[0]], [model(ids)]) < 1e-5


def test_explain_runs_every_stage_on_the_programs_own_inputs():
    style = BY_NAME["gpt_fast"]
    model = style.build()
    caches = [buffer.clone() for buffer in model.buffers()]
    report = quarot_fx.explain(exported(model, style.inputs(IDS, 0)))
    differences = {one.name: one.difference for one in report.passes}
    assert differences["rotate"] < 1e-9
    assert differences["quantize-weights"] > 1e-3
    assert all(map(torch.equal, model.buffers(), caches)), "a check writes nothing of the user's"


def test_caches_stay_in_the_graph_and_are_written():
    style = BY_NAME["gpt_fast"]
    model, eager = style.build(), style.build()
    gm = quarot_fx.rewrite(exported(model, style.inputs(IDS, 0)), stop_after="rotate")
    for start in (0, 7):  # the second call reads what the first one wrote
        inputs = style.inputs(IDS, start)
        assert relative_difference([gm(**inputs)[0]], [eager(**inputs)]) < 1e-4


def test_torch_level_graph():
    traced = torch.fx.symbolic_trace(fill(Decoder()))
    before = traced.code
    gm = quarot_fx.rewrite(traced, IDS % 16, stop_after="rotate")
    assert relative_difference([gm(IDS % 16)], [traced(IDS % 16)]) < 1e-5
    assert traced.code == before
    names = {record.parameter for record in gm.quarot.linears}
    assert {"block.query.weight", "block.down.weight", "head.weight"} <= names


def test_keyword_inputs_go_to_their_placeholders():
    module = fill(Lambda(lambda m, x, y: m.a(x) + m.b(y), a=linear(6), b=linear(6, width=8)))
    x, y = tokens(), tokens(2, 3, 8)
    traced = make_fx(module)(x, y)
    names = [node.target for node in traced.graph.find_nodes(op="placeholder")]
    gm = quarot_fx.rewrite(traced, dict(reversed(list(zip(names, (x, y), strict=True)))), stop_after="rotate")
    assert relative_difference([gm(x, y)], [module(x, y)]) < 1e-5


class Normed(torch.nn.Module):
    """A linear layer behind an RMSNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.g = linear(6), torch.nn.Parameter(torch.empty(16))
        fill(self)

    def forward(self, x):
        return self.a(rms_norm(x, self.g))


@pytest.mark.parametrize("form", FORMS)
def test_single_pass(form):
    module = Normed()
    folded = FoldGains()(RecognizeNorms()(FORMS[form](module, {"x": tokens()})))
    assert folded.reports[-1].matched == 1
    (result,) = torch.utils._pytree.tree_leaves(folded.graph_module(tokens()))
    assert relative_difference([result], [module(tokens())]) < 1e-5


def test_single_pass_on_a_torch_level_graph():
    traced = torch.fx.symbolic_trace(Normed())
    program = FoldGains()(traced, tokens())
    assert program.reports[-1].matched == 1
    assert relative_difference([program.graph_module(tokens())], [traced(tokens())]) < 1e-5


def test_single_pass_in_a_backend_of_ones_own():
    module = fill(Lambda(lambda m, x: m.a(rms_norm(x, m.g)), g=16, a=linear(6)))
    programs = []

    def backend(gm, inputs):
        programs.append(FoldGains()(gm, *inputs))
        return gm.forward

    torch.compile(module, backend=backend)(tokens())
    assert programs[0].reports[-1].matched == 1


def test_rewritten_graph_can_be_rewritten_again():
    program = captured(Lambda(lambda m, x: m.a(rms_norm(x, m.g)), g=16, a=linear(6)), tokens())
    again = Program.of(RecognizeNorms()(program).graph_module)
    (linear_,) = [node for node in again.graph.nodes if str(node.target) == "aten.linear.default"]
    assert linear_.args[1].meta["parameter"] == "a.weight"


# -- what is wrong is said -------------------------------------------------------------------------


def test_missing_inputs():
    traced = torch.fx.symbolic_trace(fill(Decoder()))
    with pytest.raises(GraphInputError, match=r"shape of its input 'ids'\. Give example inputs"):
        quarot_fx.rewrite(traced)


def test_wrong_number_of_inputs():
    traced = torch.fx.symbolic_trace(fill(Decoder()))
    with pytest.raises(GraphInputError, match="too many positional arguments"):
        quarot_fx.rewrite(traced, (IDS, IDS))


def test_weights_that_are_inputs():
    style = BY_NAME["llama2c"]
    program = exported(style.build(), style.inputs(IDS, 0))
    with pytest.raises(GraphInputError, match=r"stores no weights.*give the exported program"):
        quarot_fx.rewrite(program.graph_module)


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda model: make_fx(model, pre_dispatch=True)(tokens())])
def test_training_mode(trace):
    model = torch.nn.Sequential(linear(16), torch.nn.Dropout(0.5), linear(6))
    with pytest.raises(TrainingModeError, match=r"in training mode.*model\.eval\(\)"):
        quarot_fx.rewrite(trace(model.train()), tokens())


def test_graph_that_cannot_be_traced():
    def branches(x):
        return x.sin() if x.sum() > 0 else x.cos()

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(branches, (graph.call_module("a", (x,)),)))
    module = torch.fx.GraphModule({"a": linear(6)}, graph)
    with pytest.raises(CaptureError, match="branches"):
        quarot_fx.rewrite(module, tokens())
