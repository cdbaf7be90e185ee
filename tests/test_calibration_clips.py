"""Clip ratios that calibration finds: never worse than none by what was measured, and used wherever codes are made."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from graphs import WIDTH, Lambda, fill, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibration import EXPERTS, decoder, experts, ids, trained  # noqa: F401  a fixture
from test_calibration_gptq import SIZE, error, problem
from torch import nn
from trained import divergence

import quarot_fx
from quarot_fx.calibration import calibrate as calibrate_module
from quarot_fx.calibration.activation_clips import search_input_clip
from quarot_fx.calibration.calibrate import search_input_clips
from quarot_fx.calibration.gptq import gptq_round
from quarot_fx.calibration.hessian import Hessian
from quarot_fx.calibration.nearest import nearest_round
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.weight_clips import OUTPUT_RATIOS, rounded_at
from quarot_fx.config import QuantScheme, QuarotConfig
from quarot_fx.errors import ClipNotCalibratedError, NotCalibratedError, OptionError, UnknownOptionError
from quarot_fx.float64 import relative_difference
from quarot_fx.ops.affine import decode, encode, weight_scale_and_zero
from quarot_fx.ops.clip_search import search_clip
from quarot_fx.passes.quantized import rounded

NEAREST = {"w_rounding": "nearest"}
SEARCHED = {"w_clip": "output", "a_clip": "output", "kv_clip": "search"}
SCHEMES = st.builds(QuantScheme, st.integers(2, 8), st.sampled_from([None, 6, 12]), st.booleans(), st.just("output"))

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- the searches ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scheme=SCHEMES)
def test_a_weight_rounded_to_nearest_is_never_worse_than_unclipped(seed, scheme):
    weight, hessian = problem(seed)
    scale, zero = weight_scale_and_zero(weight, scheme.bits, scheme.group, 1.0, scheme.symmetric)
    unclipped = decode(encode(weight, scale, zero, scheme.bits), scale, zero, weight.dtype)
    before = (((weight - unclipped) @ hessian.matrix) * (weight - unclipped)).sum(-1)
    found = nearest_round(weight, hessian, scheme)
    assert (found.changes <= before * (1 + 1e-9)).all()
    assert float(found.changes.sum()) == pytest.approx(error(weight, found, hessian))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_ratio_of_a_row_is_the_best_of_all(symmetric):
    weight, hessian = problem(rows=16)
    scheme = QuantScheme(3, None, symmetric, "output")
    errors = [weight - rounded_at(weight, scheme, ratio) for ratio in OUTPUT_RATIOS]
    least = torch.stack([((one @ hessian.matrix) * one).sum(-1) for one in errors]).amin(0)
    torch.testing.assert_close(nearest_round(weight, hessian, scheme).changes, least)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), scheme=SCHEMES, act_order=st.booleans())
def test_a_weight_rounded_by_gptq_is_never_worse_than_unclipped_nor_than_clipped_for_itself(seed, scheme, act_order):
    weight, hessian = problem(seed)
    options = GPTQOptions(act_order=act_order)
    found, *others = (
        gptq_round(weight, hessian, replace(scheme, clip=clip), options) for clip in ("output", 1.0, "search")
    )
    assert all((found.changes <= other.changes * (1 + 1e-9)).all() for other in others)
    assert float(found.changes.sum()) == pytest.approx(error(weight, found, hessian))


def test_without_rows_a_weight_is_clipped_for_itself():
    weight, _ = problem()
    found = nearest_round(weight, Hessian(SIZE, weight.device), QuantScheme(4, 8, True, "output"))
    expected = quarot_fx.ops.quantize_weight(weight, 4, 8, None, True)
    assert torch.equal(found.codes, expected[0])
    assert (search_clip(weight, 4, 8, True) < 1).any()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    scheme=SCHEMES,
    shapes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_an_input_is_never_worse_than_unclipped(seed, scheme, shapes, scale):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(rows, SIZE, generator=generator) for rows in shapes]  # wide and narrow ones
    parts = [[torch.randn(7, SIZE, generator=generator) * scale for _ in range(2)] for _ in shapes]
    clip, change, unclipped = search_input_clip(matrices, parts.__getitem__, scheme)

    def measured(ratio):
        pairs = [(matrix, torch.cat(part)) for matrix, part in zip(matrices, parts, strict=True)]
        errors = [(x - rounded(x, replace(scheme, clip=ratio))) @ matrix.T for matrix, x in pairs]
        outputs = [x @ matrix.T for matrix, x in pairs]
        return (sum(one.square().sum() for one in errors) / sum(one.square().sum() for one in outputs)).sqrt().item()

    assert 0 < clip <= 1
    assert change <= unclipped
    assert change == pytest.approx(measured(clip), rel=1e-3, abs=1e-5)
    assert unclipped == pytest.approx(measured(1.0), rel=1e-3, abs=1e-5)


def test_an_outlier_that_no_output_reads_is_clipped():
    x = torch.cat([torch.randn(50, 63, generator=torch.Generator().manual_seed(0)), torch.full((50, 1), 9.0)], -1)
    weight = torch.eye(64)[:63]
    clip, change, unclipped = search_input_clip([weight], lambda _: [x], QuantScheme(4, None, True, "output"))
    assert clip < 0.6
    assert change < 0.7 * unclipped


# -- a model -----------------------------------------------------------------------------------------


def test_a_trained_model_predicts_better(trained):  # noqa: F811
    model, tokens = trained
    found = quarot_fx.calibrate(model, tokens[:16], **NEAREST, **SEARCHED)
    assert all(one.error <= one.unclipped_error for one in found.inputs)
    assert all(one.error <= one.unclipped_error for one in found.caches)
    assert divergence(model, tokens[16:], **found.options) < 0.9 * divergence(model, tokens[16:])


def test_a_trained_model_predicts_better_by_gptq_of_few_bits(trained):  # noqa: F811
    model, tokens = trained
    options = {"w_bits": 3, "a_bits": 16, "kv_bits": 16, "gptq": {"act_order": False, "sweeps": 0}}
    for_themselves, for_outputs = (
        quarot_fx.calibrate(model, tokens[:16], **options, w_clip=clip).options for clip in ("search", "output")
    )
    found, before = (divergence(model, tokens[16:], **one) for one in (for_outputs, for_themselves))
    assert found < 0.97 * before


@pytest.mark.parametrize("gptq", [{}, {"quantized_inputs": True, "target": "model"}])
@pytest.mark.parametrize("options", [NEAREST, {"w_group": 4, "a_group": 4, "a_sym": False, "w_sym": False}])
def test_ratios_reach_the_graph_and_its_report(gptq, options):
    model = decoder()
    found = quarot_fx.calibrate(model, ids(), gptq=gptq, **options, **SEARCHED)
    assert len(found.inputs) == 4  # of q, k and v; o; gate and up; down
    ratios = {parameter: one.clip for one in found.inputs for parameter in one.parameters}
    json.dumps(found.options)
    for kernels in ("none", "reference"):
        rewritten = quarot_fx.rewrite(model, ids(2), kernels=kernels, **found.options)
        assert {one.parameter: one.a_clip for one in rewritten.quarot.linears if not one.role} == ratios
        assert rewritten(ids(2))[0].isfinite().all()
        clips = {argument for node in rewritten.graph.nodes for argument in node.args if isinstance(argument, float)}
        assert clips >= {one.clip for one in found.inputs}
    assert "clip ratios found on calibration data" in str(found)
    assert "attention, keys: of themselves" in str(found)


def test_quantized_inputs_are_clipped_as_found():
    """The second layer's weight is rounded on what the found ratio makes of its input, not on the unclipped one."""
    options = {"a_clip": "output", "a_bits": 2, "overrides": {"*.down": {"w_bits": 2}}}
    model = decoder()
    found = quarot_fx.calibrate(model, ids(), gptq={"quantized_inputs": True}, **options)
    again = quarot_fx.calibrate(model, ids(), gptq={"quantized_inputs": True}, **found.options)
    unclipped = quarot_fx.calibrate(model, ids(), gptq={"quantized_inputs": True}, **{**options, "a_clip": 1.0})
    assert again.weights == found.weights != unclipped.weights
    assert again.inputs == ()
    assert again.options == found.options


def test_only_inputs_are_calibrated_where_weights_are_not():
    model = decoder()
    found = quarot_fx.calibrate(model, ids(), **NEAREST, w_bits=16, a_clip="output")
    assert not found.weights
    assert len(found.inputs) == 4
    caches = quarot_fx.calibrate(model, ids(), **NEAREST, kv_clip="search")
    assert (caches.weights, caches.inputs) == ((), ())
    assert [(one.kind, one.clip) for one in caches.caches] == [
        (kind, caches.options[f"{kind[0]}_clip"]) for kind in ("key", "value")
    ]
    only_values = quarot_fx.calibrate(model, ids(), **NEAREST, v_clip="search")
    assert only_values.caches == caches.caches[1:]


def test_options_that_a_layer_has_already_stay():
    own = {"*.up": {"a_bits": 8}, "*.down": {"a_clip": 0.7, "w_bits": 8}, "*.out": "skip"}
    model = decoder()
    found = quarot_fx.calibrate(model, ids(), a_clip="output", overrides=own)
    config = QuarotConfig.from_options(found.options)
    named = {parameter for one in found.inputs for parameter in one.parameters}
    assert "block.down.weight" not in named
    assert config.for_parameter("block.up.weight").a_bits == 8
    assert (config.for_parameter("block.down.weight").a_clip, config.for_parameter("block.down.weight").w_bits) == (
        0.7,
        8,
    )
    assert len([one for one in found.inputs if {"block.up.weight", "block.gate.weight"} & set(one.parameters)]) == 2
    quarot_fx.rewrite(model, ids(1), **found.options)


def test_names_of_parameters_are_taken_literally():
    config = QuarotConfig(overrides={"*": {"w_bits": 8}}).with_overrides({"a[0].weight": {"a_clip": 0.5}})
    assert config.for_parameter("a[0].weight").a_clip == 0.5
    assert config.for_parameter("a[0].weight").w_bits == 8
    assert config.for_parameter("a0.weight").a_clip == 0.9


def test_one_weight_of_two_layers_gets_one_ratio():
    model = fill(Lambda(lambda m, ids: m.a(m.a(m.e(ids)).relu()).sin(), e=nn.Embedding(16, WIDTH), a=linear(WIDTH)))
    options = {"rotation": "none", "overrides": {"a": {"w_bits": 4}}, "a_clip": "output"}
    found = quarot_fx.calibrate(model, ids(), **options)
    assert [one.parameters for one in found.inputs] == [("a.weight",)]
    assert quarot_fx.rewrite(model, ids(1), **found.options)(ids(1))[0].isfinite().all()


def test_experts_share_a_ratio():
    def route(m, ids):
        rows, chosen = m.e(ids).flatten(0, 1), (ids >= 8).long().flatten()
        return torch.bmm(m.w[chosen], rows[..., None]).sin()

    model = experts(route)
    options = {**EXPERTS, "a_bits": 4, "a_clip": "output", "w_clip": "output", **NEAREST}
    found = quarot_fx.calibrate(model, ids(), **options)
    assert [one.parameters for one in found.inputs] == [("w",)]
    assert found.inputs[0].error < found.inputs[0].unclipped_error
    assert [weight.name for weight in found.unseen] == ["w[2]"]
    assert quarot_fx.rewrite(model, ids(1), **found.options)(ids(1))[0].isfinite().all()


def test_a_checkpoint_keeps_what_was_found(tmp_path):
    model = decoder()
    found = quarot_fx.calibrate(model, ids(), **NEAREST, **SEARCHED, nested_backend="eager")
    expected = quarot_fx.rewrite(model, ids(2), **found.options)(ids(2))[0]
    quarot_fx.save(model, tmp_path, ids(2), **found.options)
    loaded = quarot_fx.load(tmp_path, model=decoder(seed=1), nested_backend="eager")
    assert relative_difference([loaded(ids(2))], [expected]) < 1e-5


@pytest.mark.parametrize("gptq", [{}, {"quantized_inputs": True}])
def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, gptq):
    options = {**SEARCHED, "overrides": {"*.up": {"w_clip": 1.0}, "*.gate": {"w_rounding": "nearest"}}}
    expected = quarot_fx.calibrate(decoder(), ids(), gptq=gptq, **options)
    searched = []

    def interrupted(group, *arguments):
        searched.append(group)
        if len(searched) == 3:
            raise KeyboardInterrupt
        return search_input_clips(group, *arguments)

    monkeypatch.setattr(calibrate_module, "search_input_clips", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quarot_fx.calibrate(decoder(), ids(), gptq=gptq, state=tmp_path, **options)
    monkeypatch.delattr(calibrate_module, "search_cache_clip")  # it is not searched again
    resumed = quarot_fx.calibrate(decoder(), ids(), gptq=gptq, state=tmp_path, **options)
    assert len(searched) == 3 + 2
    assert (resumed.options, resumed.weights, resumed.inputs) == (expected.options, expected.weights, expected.inputs)
    assert resumed.caches == expected.caches


# -- mistakes ----------------------------------------------------------------------------------------


def test_what_was_not_calibrated_is_an_error():
    model = decoder()
    with pytest.raises(
        ClipNotCalibratedError, match=r"a_clip='output' of the input of block.query.weight .* calibration.options"
    ):
        quarot_fx.rewrite(model, ids(1), a_clip="output")
    with pytest.raises(
        ClipNotCalibratedError, match=r"k_clip='search' of a key of block.* is a ratio that calibration finds"
    ):
        quarot_fx.rewrite(model, ids(1), kv_clip="search")
    with pytest.raises(NotCalibratedError, match=r"is to be rounded by w_clip='output', and no calibration"):
        quarot_fx.rewrite(model, ids(1), w_clip="output")
    with pytest.raises(NotCalibratedError, match=r"by w_rounding='gptq' and w_clip='output', and no"):
        quarot_fx.rewrite(model, ids(1), w_clip="output", w_rounding="gptq")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"w_clip": "outptu"}, UnknownOptionError, "Did you mean 'output'"),
        ({"a_clip": "search"}, UnknownOptionError, "unknown a_clip 'search'.*Known: output"),
        ({"kv_clip": "serach"}, UnknownOptionError, "unknown kv_clip.* Did you mean 'search'"),
        ({"a_clip": 1.5}, OptionError, r'a_clip=1.5: must be a ratio in \(0, 1\], or "output"'),
        ({"overrides": {"x": {"a_clips": 1}}}, UnknownOptionError, "Did you mean 'a_clip'"),
    ],
)
def test_mistakes_in_options_are_typed(options, error, message):
    with pytest.raises(error, match=message):
        QuarotConfig.from_options(options)
