"""Tuned scales, from a model to the graphs and checkpoints that use them."""

from __future__ import annotations

import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, fill, linear
from models import random_token_ids, tiny_model
from test_learning import ids
from torch import nn
from trained import babyllama, divergence, stories

import quarot_fx
from quarot_fx.calibration.programs import capture_programs
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import (
    CalibrationDataError,
    ClipNotCalibratedError,
    LearningError,
    NotCalibratedError,
    NothingToTuneError,
    OptionError,
    UnknownOptionError,
)
from quarot_fx.float64 import relative_difference
from quarot_fx.learning.options import TuningOptions
from quarot_fx.learning.scaled import ScaledModel
from quarot_fx.learning.tune import _split
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.quantized import quantized_weight

SHORT = {"steps": 3, "batch": 2, "rate": 0.02, "interval": 1}
GROUPS = {"w_group": 4, "a_group": 4, "a_sym": False}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def tune(model, tokens, tuning=SHORT, **options):
    return quarot_fx.tune_scales(model, tokens, tuning=tuning, **options)


def codes_and_scales(model, tokens, **options):
    """Return packed codes and scales of all layers under some options, by the layer's weight."""
    config = QuarotConfig.from_options(options)
    program = FoldConstants(config)(capture_programs(model, tokens, config).quantized)
    found = {}
    for layer in linear_likes(program.graph):
        if (weight := quantized_weight(layer.weight)) is not None:
            value = dict(program.graph_module.named_buffers()) | dict(program.graph_module.named_parameters())
            found[layer.parameter] = [value[node.target] for node in (weight.codes.args[0], weight.scale)]
    return found


# -- what it is for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", pytest.param("gptq", marks=pytest.mark.slow)])
def test_the_loss_falls_on_what_it_is_tuned_on(rounding):
    model, tokens = babyllama(), stories(64, 96)
    if rounding == "gptq":
        quarot_fx.calibrate(model, tokens[:16])
    data = torch.cat([tokens[:16], tokens[:4]])  # so that what fits the first ones is best on those held out, too
    tuned = tune(model, data, {"steps": 32, "batch": 4, "rate": 0.02, "interval": 8}, w_rounding=rounding)
    assert len(tuned.losses) == 32
    assert sum(tuned.losses[-4:]) < 0.95 * sum(tuned.losses[:4])  # 4 steps see every sequence once
    assert list(tuned.held_out) == [0, 8, 16, 24, 32]
    assert divergence(model, tokens[:16], w_rounding="tuned") < divergence(model, tokens[:16], w_rounding=rounding)


def test_what_is_kept_is_never_worse_on_what_is_held_out():
    model, tokens = babyllama(), stories(64, 96)
    tuned = tune(model, tokens[:12], {"steps": 4, "batch": 4, "rate": 0.9, "interval": 2})
    held_out, options = tokens[8:12], {"w_rounding": "tuned"}
    assert tuned.kept == 0 < max(tuned.held_out.values()) > 2 * tuned.held_out[0]  # such a rate breaks the model
    assert divergence(model, held_out, **options) == pytest.approx(divergence(model, held_out), rel=1e-5)
    assert divergence(model, held_out, **options) == pytest.approx(tuned.held_out[0], rel=1e-3)


def test_the_best_scales_are_those_that_graphs_use():
    """The loss that the report tells of the step that was kept is that of the graph."""
    model, inputs = fill(Decoder()), ids(2)
    tuned = tune(model, inputs.repeat(2, 1), {**SHORT, "steps": 8}, **GROUPS)
    assert tuned.kept > 0
    expected = model(inputs).log_softmax(-1)
    actual = quarot_fx.rewrite(model, inputs, **tuned.options)(inputs)[0].log_softmax(-1)
    loss = nn.functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1).mean().item()
    assert loss == pytest.approx(tuned.held_out[tuned.kept], rel=1e-3)


# -- what is tuned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, GROUPS, {"w_sym": False, "w_group": 2}, {"w_bits": 3, "a_bits": 16}])
def test_codes_stay_and_scales_do_not(options):
    model = fill(Decoder())
    before = codes_and_scales(model, ids(1), **options)
    tuned = tune(model, ids(8), {**SHORT, "held_out": 0.25}, **options)
    after = codes_and_scales(model, ids(1), **tuned.options)
    assert before.keys() == after.keys()
    assert len(after) == tuned.weights
    changes = []
    for parameter, (codes, scale) in before.items():
        assert torch.equal(after[parameter][0], codes)
        changes.append((after[parameter][1] / scale - 1).abs().max().item())
        assert after[parameter][1].dtype == scale.dtype
    assert tuned.scales == sum(scale.numel() for _, scale in before.values())
    assert tuned.kept == 0 or 1e-3 < max(changes) < 0.1


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "phi"])
def test_other_architectures(name):
    """Transposed weights, stacks of experts, biases and parallel blocks."""
    model, tokens = tiny_model(name), random_token_ids(6, 12)
    tuned = tune(model, tokens, {**SHORT, "steps": 1})
    assert tuned.losses[0] > 0
    inputs = {"input_ids": tokens[:1], "use_cache": False}
    assert quarot_fx.rewrite(model, inputs, **tuned.options)(tokens[:1])[0].isfinite().all()


def test_weights_of_some_layers_only():
    model = fill(Decoder())
    overrides = {"block.*": {"w_rounding": "nearest", "w_bits": 8}, "block.output": "skip"}
    tuned = tune(model, ids(8), overrides=overrides)
    rounding = {one["w_rounding"] for one in tuned.options["overrides"].values() if "w_rounding" in one}
    assert rounding == {"tuned"}
    layers = quarot_fx.explain(model, ids(1), check=False, **tuned.options).linears
    assert {layer.rounding for layer in layers if layer.w_bits < 16} == {"tuned"}
    assert tuned.weights == sum(layer.w_bits < 16 for layer in layers)


def test_the_model_and_other_codes_stay_as_they_are():
    model = fill(Decoder())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quarot_fx.calibrate(model, ids())
    gptq = codes_and_scales(model, ids(1), w_rounding="gptq")
    tune(model, ids(8), w_rounding="gptq", free_originals=True)
    again = codes_and_scales(model, ids(1), w_rounding="gptq")
    assert all(torch.equal(one, other) for p in gptq for one, other in zip(gptq[p], again[p], strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_it_is_tuned_towards_is_the_float_model():
    """In float64, to rounding: nothing is lost on the way to the loss but what is quantised."""
    model, tokens = tiny_model("llama").double(), random_token_ids(2, 12)
    config = QuarotConfig(a_bits=16, k_bits=16, v_bits=16)
    scaled = ScaledModel(capture_programs(model, tokens, config), config, tokens.shape, True)
    teacher, token_input = scaled._teacher
    expected = model(input_ids=tokens, use_cache=False).logits
    assert relative_difference([teacher({token_input: tokens})], [expected]) < 1e-6
    inputs = {"input_ids": tokens, "use_cache": False}
    student, token_input = scaled._student
    rounded = quarot_fx.rewrite(model, inputs, a_bits=16, kv_bits=16)(tokens)[0]
    assert relative_difference([student({token_input: tokens})], [rounded]) < 1e-9


def test_the_same_seed_gives_the_same_scales():
    model = fill(Decoder())
    first, again, other = (tune(model, ids(8), {**SHORT, "seed": seed, "batch": 1}) for seed in (0, 0, 1))
    assert first.losses == again.losses != other.losses


def test_long_sequences_are_cut():
    tuned = tune(fill(Decoder()), ids(4, 13), {**SHORT, "length": 6})
    assert tuned.losses == tune(fill(Decoder()), torch.cat([ids(4, 13)[:, :12].reshape(8, 6)]), SHORT).losses


def test_whole_batches_are_held_out():
    tokens = torch.arange(40)[:, None]
    for fraction, batch, count in ((0.125, 4, 4), (0.25, 4, 8), (0.01, 4, 4), (0.5, 1, 20)):
        held_out, rest = _split(tokens, TuningOptions(held_out=fraction, batch=batch))
        assert held_out.flatten().tolist() == list(range(40 - count, 40))
        assert rest.flatten().tolist() == list(range(40 - count))


# -- what uses it --------------------------------------------------------------------------------------


def test_a_checkpoint_holds_tuned_scales(tmp_path):
    model = tiny_model("llama", num_hidden_layers=1)
    tokens = random_token_ids(2, 12).repeat(2, 1)  # it is tuned on what is held out
    quarot_fx.calibrate(model, tokens, **GROUPS)
    tuned = tune(model, tokens, {**SHORT, "steps": 8}, w_rounding="gptq", **GROUPS)
    assert tuned.kept > 0
    inputs = {"input_ids": tokens[:1], "use_cache": False}
    expected = quarot_fx.rewrite(model, inputs, **tuned.options)(tokens[:1])[0]
    quarot_fx.save(model, tmp_path / "model", **tuned.options)
    loaded = quarot_fx.load(tmp_path / "model", nested_backend="eager")
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    rounded = quarot_fx.rewrite(model, inputs, w_rounding="gptq", **GROUPS)(tokens[:1])[0]
    assert (expected - rounded).abs().max() > 1e-3


def test_the_report():
    tuned = tune(fill(Decoder()), ids(8))
    text = str(tuned)
    assert f"scales of {tuned.weights} weights tuned" in text
    assert text.count("kept") == 1
    assert tuned.as_dict()["tuning"]["steps"] == 3


# -- mistakes ------------------------------------------------------------------------------------------


def test_nothing_to_tune():
    model = fill(Decoder())
    with pytest.raises(NothingToTuneError, match="under these options no linear layer's weight is quantised"):
        tune(model, ids(8), w_bits=16)


def test_what_is_to_be_calibrated_before():
    model = fill(Decoder())
    with pytest.raises(NotCalibratedError, match=r"w_rounding='gptq'.*Call quarot_fx.calibrate"):
        tune(model, ids(8), w_rounding="gptq")
    with pytest.raises(ClipNotCalibratedError, match="k_clip='search'"):
        tune(model, ids(8), k_clip="search")
    with pytest.raises(NotCalibratedError, match=r"w_rounding='tuned'.*then quarot_fx.tune_scales"):
        quarot_fx.rewrite(model, ids(1), w_rounding="tuned")(ids(1))
    for find in (tune, quarot_fx.calibrate):
        for options in ({"w_rounding": "tuned"}, {"overrides": {"block.*": {"w_rounding": "tuned"}}}):
            with pytest.raises(OptionError, match="is what tune_scales ends with: say how weights are rounded before"):
                find(model, ids(8), **options)


def test_a_model_without_logits():
    model = fill(Lambda(lambda m, ids: m.a(m.e(ids)).sum((1, 2)), e=nn.Embedding(16, WIDTH), a=linear(WIDTH)))
    with pytest.raises(LearningError, match=r"logits \[2, 12, vocabulary\]. Give a model that returns logits"):
        tune(model, ids(8), overrides={"a": {"w_bits": 4}})


def test_a_loss_that_is_no_number():
    model = fill(Decoder())
    model.head.weight.mul_(1e38)
    with pytest.raises(LearningError, match="the loss is"):
        tune(model, ids(8))


def test_too_few_sequences():
    with pytest.raises(
        CalibrationDataError, match="of 4 sequences 4 are held out, which leaves less than a batch of 4"
    ):
        tune(fill(Decoder()), ids(4), {"batch": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "option steps=0: must be an integer, 1 or more"),
        ({"interval": True}, "must be an integer, 1 or more"),
        ({"held_out": 1}, r"must be a fraction in \(0, 1\)"),
        ({"rate": -0.1}, r"must be a fraction in \(0, 1\)"),
        ({"recompute": 1}, "must be True or False"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        TuningOptions.from_options(options)


def test_options_that_there_are_not():
    with pytest.raises(UnknownOptionError, match="option of tuning"):
        TuningOptions.from_options({"stepps": 3})
