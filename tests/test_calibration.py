"""Calibration from a model to the graphs that use its codes."""

from __future__ import annotations

import json

import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, fill, linear
from models import random_token_ids, tiny_model
from tiny_decoders import build
from torch import nn
from trained import babyllama, divergence, stories
from transformers import DynamicCache

import quarot_fx
from quarot_fx.calibration import calibrate as calibrate_module
from quarot_fx.calibration.data import calibration_tokens
from quarot_fx.calibration.rounding import round_weights
from quarot_fx.errors import (
    CalibrationDataError,
    CalibrationStateError,
    MissingExtraError,
    NotCalibratedError,
    NotFoundError,
    NothingToCalibrateError,
)
from quarot_fx.float64 import relative_difference

GPTQ = {"w_rounding": "gptq"}
EAGER = {**GPTQ, "nested_backend": "eager"}
WEIGHTS_ONLY = {"a_bits": 16, "kv_bits": 16}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def ids(count=24, length=12, vocabulary=16, seed=0):
    """Token ids for :class:`Decoder`."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def decoder(seed=0):
    """A decoder whose embeddings lie near a plane, so that the inputs of its layers depend on each other."""
    model = fill(Decoder(), seed)
    weight = model.embedding.weight
    weight.copy_(weight[:, :3] @ weight[:3] / 2 + 0.1 * weight)
    return model


def output_error(model, tokens, **options):
    rewritten = quarot_fx.rewrite(model, tokens, **options)
    return relative_difference(list(rewritten(tokens)), [model(tokens)])


@pytest.fixture(scope="module")
def trained():
    """A trained model, and sequences that it wrote itself."""
    return babyllama(), stories(24, 96)


@pytest.mark.parametrize(
    "gptq",
    [
        {},
        pytest.param({"act_order": False, "sweeps": 0}, marks=pytest.mark.slow),
        pytest.param({"target": "model", "quantized_inputs": True}, marks=pytest.mark.slow),
    ],
    ids=["default", "as published", "towards the model"],
)
def test_a_trained_model_predicts_better_than_with_weights_rounded_to_nearest(trained, gptq):
    model, tokens = trained
    quarot_fx.calibrate(model, tokens[:16], gptq=gptq)
    assert divergence(model, tokens[16:], **GPTQ) < 0.95 * divergence(model, tokens[16:])


def test_outputs_change_less_than_by_rounding_to_nearest():
    model = decoder()
    calibration = quarot_fx.calibrate(model, ids(), **WEIGHTS_ONLY)
    assert len(calibration.weights) == 7
    assert all(weight.error < weight.nearest_error for weight in calibration.weights)
    assert all(weight.tokens == 24 * 12 for weight in calibration.weights)
    test = ids(8, seed=1)
    assert output_error(model, test, **WEIGHTS_ONLY, **GPTQ) < output_error(model, test, **WEIGHTS_ONLY)


@pytest.mark.parametrize(
    "options",
    [
        {"a_sym": False, "w_sym": False},
        {"w_group": 4, "a_group": 4},
        {"w_bits": 3, "w_clip": 0.9, "rotation": "none"},
        {"overrides": {"*.up": {"w_bits": 8}, "*.gate": {"w_rounding": "nearest"}, "head": {"w_bits": 4}}},
    ],
)
@pytest.mark.parametrize("gptq", [{}, {"target": "model", "quantized_inputs": True}])
def test_every_scheme_is_calibrated_and_used(options, gptq):
    model = decoder()
    calibration = quarot_fx.calibrate(model, ids(), gptq=gptq, **options)
    rewritten = quarot_fx.rewrite(model, ids(2), **GPTQ, **options)
    assert rewritten(ids(2))[0].isfinite().all()
    by_gptq = [linear.parameter for linear in rewritten.quarot.linears if linear.rounding == "gptq"]
    assert sorted(by_gptq) == sorted(weight.parameter for weight in calibration.weights)
    assert ("head.weight" in by_gptq, "block.gate.weight" in by_gptq) == (
        (True, False) if "overrides" in options else (False, True)
    )
    assert "W4A4 gptq" in str(rewritten.quarot) or "W3A4 gptq" in str(rewritten.quarot)


def test_the_model_stays_as_it_is():
    model = decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quarot_fx.calibrate(model, ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_prompt_and_decoding_use_the_codes(graphs):
    model, tokens = tiny_model("llama", num_hidden_layers=1), random_token_ids(length=9)
    quarot_fx.calibrate(model, random_token_ids(8, 16, seed=1))
    whole = quarot_fx.rewrite(model, {"input_ids": tokens, "use_cache": False}, **GPTQ)(tokens)[0]
    compiled = torch.compile(model, backend="quarot", options=EAGER)
    cache = DynamicCache(config=model.config)
    steps = [compiled(input_ids=part, past_key_values=cache).logits for part in tokens.split([6, 1, 1, 1], dim=1)]
    assert graphs() > 1
    nearest = quarot_fx.rewrite(model, {"input_ids": tokens, "use_cache": False})(tokens)[0]
    assert relative_difference([torch.cat(steps, 1)], [whole]) < 1e-4 < relative_difference([nearest], [whole])


def test_layers_in_stages_get_the_inputs_of_rounded_ones():
    """Of two linears in a row the second is calibrated on what the codes of the first make of the data."""
    model = fill(Lambda(lambda m, ids: m.b(m.a(m.e(ids)).relu()).sin(), e=nn.Embedding(16, WIDTH), a=linear(WIDTH),
                        b=linear(WIDTH)))  # fmt: skip
    options, named = {**WEIGHTS_ONLY, "w_bits": 2, "rotation": "none"}, {"b": {"w_bits": 2}}  # else b is the head
    calibration = quarot_fx.calibrate(model, ids(), **options, overrides=named)
    assert [weight.parameter for weight in calibration.weights] == ["a.weight", "b.weight"]
    float_first = quarot_fx.calibrate(model, ids(), **options, overrides={"a": "skip", **named})
    assert [weight.parameter for weight in float_first.weights] == ["b.weight"]
    assert float_first.weights[0].error != calibration.weights[1].error


def test_two_layers_with_one_weight_get_one_set_of_codes():
    model = fill(Lambda(lambda m, ids: m.a(m.a(m.e(ids)).relu()).sin(), e=nn.Embedding(16, WIDTH), a=linear(WIDTH)))
    options = {"rotation": "none", "overrides": {"a": {"w_bits": 4}}}
    calibration = quarot_fx.calibrate(model, ids(), **options)
    assert [weight.parameter for weight in calibration.weights] == ["a.weight"]
    assert quarot_fx.rewrite(model, ids(1), **options, **GPTQ)(ids(1))[0].isfinite().all()


# -- experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_expert_is_calibrated_on_its_own_tokens(name, implementation):
    tiny = build(name)
    tiny.model.set_experts_implementation(implementation)
    tokens = torch.randint(3, 256, (6, 16), generator=torch.Generator().manual_seed(0))
    calibration = quarot_fx.calibrate(tiny.model, tokens, **WEIGHTS_ONLY)
    chosen = tiny.config.num_experts_per_tok * tokens.numel()
    experts = [weight for weight in calibration.weights if weight.matrix is not None]
    stacks = {weight.parameter for weight in experts}
    assert len(stacks) == 2 * tiny.layers
    for stack in stacks:
        assert sum(weight.tokens for weight in experts if weight.parameter == stack) == chosen
    assert all(weight.error <= weight.nearest_error for weight in experts)
    inputs = {"input_ids": tokens[:1], "use_cache": False}
    report = quarot_fx.explain(tiny.model, inputs, check=False, **WEIGHTS_ONLY, **GPTQ)
    assert {linear.rounding for linear in report.linears if ".experts." in linear.parameter} == {"gptq"}


EXPERTS = {**WEIGHTS_ONLY, "rotation": "none", "overrides": {"w": {"w_bits": 4}}}  # named, or they are a head


def experts(function):
    """A function of three experts' weights, and of token ids whose row decides on the expert."""
    return fill(Lambda(function, e=nn.Embedding(16, WIDTH), w=(3, WIDTH, WIDTH)))


def test_experts_without_tokens_are_named_and_rounded_to_nearest():
    def route(m, ids):
        rows, chosen = m.e(ids).flatten(0, 1), (ids >= 8).long().flatten()  # expert 2 is never chosen
        return torch.bmm(m.w[chosen], rows[..., None]).sin()

    model = experts(route)
    calibration = quarot_fx.calibrate(model, ids(), **EXPERTS)
    assert [weight.name for weight in calibration.unseen] == ["w[2]"]
    assert not calibration.underdetermined
    assert "no token reached these, which are rounded to nearest: w[2]" in str(calibration)
    few = quarot_fx.calibrate(model, torch.tensor([[1, 2, 3, 4, 5, 9, 10]]), **EXPERTS)
    assert [weight.name for weight in few.underdetermined] == ["w[0]", "w[1]"]
    assert "w[0], w[1]" in str(few)

    def only_the_last(m, ids):
        rows = m.e(ids).flatten(0, 1)
        return torch.bmm(m.w[torch.full_like(ids.flatten(), 2)], rows[..., None]).sin()

    last = experts(only_the_last)
    last.e, last.w = model.e, model.w
    nearest, calibrated = (quarot_fx.rewrite(last, ids(1), **EXPERTS, **rounding)(ids(1))[0] for rounding in ({}, GPTQ))
    assert torch.equal(nearest, calibrated)


def test_a_batch_of_products():
    model = experts(lambda m, ids: torch.bmm(m.e(ids).expand(3, -1, -1), m.w).sin())
    calibration = quarot_fx.calibrate(model, ids(), **EXPERTS)
    assert [(weight.name, weight.tokens) for weight in calibration.weights] == [(f"w[{i}]", 288) for i in range(3)]
    broadcast = experts(lambda m, ids: (m.e(ids)[:, None] @ m.w).sin())
    assert [weight.tokens for weight in quarot_fx.calibrate(broadcast, ids(), **EXPERTS).weights] == [288] * 3


# -- nothing falls back silently -----------------------------------------------------------------------


def test_a_weight_that_was_not_calibrated_is_an_error():
    model = decoder()
    message = (
        r"weight 'block.query.weight' is to be rounded by w_rounding='gptq', and no calibration .* quarot_fx.calib"
    )
    with pytest.raises(NotCalibratedError, match=message):
        quarot_fx.rewrite(model, ids(1), **GPTQ)
    compiled = torch.compile(model, backend="quarot", options=EAGER)
    with pytest.raises(NotCalibratedError):
        compiled(ids(1))
    quarot_fx.calibrate(model, ids())
    torch._dynamo.reset()
    assert compiled(ids(1)).isfinite().all()
    for other in ({"w_bits": 3}, {"seed": 1}, {"w_clip": 1.0}):
        with pytest.raises(NotCalibratedError):
            quarot_fx.rewrite(model, ids(1), **GPTQ, **other)
    model.block.up.weight.mul_(2)
    with pytest.raises(NotCalibratedError, match=r"block.up.weight"):
        quarot_fx.rewrite(model, ids(1), **GPTQ)


def test_planning_needs_no_codes():
    with torch.device("meta"):
        model = Decoder().eval()
    report = quarot_fx.explain(model, torch.empty(1, 5, dtype=torch.int64, device="meta"), **GPTQ)
    assert {linear.rounding for linear in report.linears if not linear.role} == {"gptq"}


def test_a_failed_calibration_leaves_no_codes(monkeypatch):
    model = decoder()
    quarot_fx.calibrate(model, ids())
    quarot_fx.rewrite(model, ids(1), **GPTQ)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "round_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        quarot_fx.calibrate(model, ids())
    with pytest.raises(NotCalibratedError):
        quarot_fx.rewrite(model, ids(1), **GPTQ)


def test_nothing_to_calibrate():
    for options in ({"w_bits": 16}, {"w_rounding": "nearest"}, {"disabled_passes": "quantize-weights"}):
        with pytest.raises(NothingToCalibrateError, match="explain"):
            quarot_fx.calibrate(decoder(), ids(), **options)


def test_freed_originals_keep_their_codes(graphs):
    model = decoder()
    quarot_fx.calibrate(model, ids())
    expected = quarot_fx.rewrite(model, ids(1), **GPTQ)(ids(1))[0]
    compiled = torch.compile(model, backend="quarot", options={**EAGER, "free_originals": True}, dynamic=False)
    assert relative_difference([compiled(ids(1))], [expected]) < 1e-5
    assert compiled(ids(3, 4)).isfinite().all()
    assert graphs() == 2


# -- resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gptq", [{}, {"target": "model", "quantized_inputs": True}])
def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, gptq):
    model = decoder()
    expected = quarot_fx.calibrate(model, ids(), gptq=gptq, offload=True)
    logits = quarot_fx.rewrite(model, ids(2), **GPTQ)(ids(2))[0]
    rounded, interruptions = [], [1, 3]

    def interrupted(group, *arguments):
        if len(rounded) in interruptions:
            interruptions.remove(len(rounded))
            raise KeyboardInterrupt
        rounded.append(group)
        return round_weights(group, *arguments)

    monkeypatch.setattr(calibrate_module, "round_weights", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quarot_fx.calibrate(model, ids(), gptq=gptq, state=tmp_path)
    resumed = quarot_fx.calibrate(model, ids(), gptq=gptq, state=tmp_path)
    assert resumed.weights == expected.weights
    assert len(rounded) == 4  # q, k and v; o; gate and up; down: each once
    assert torch.equal(quarot_fx.rewrite(model, ids(2), **GPTQ)(ids(2))[0], logits)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = quarot_fx.calibrate(decoder(), ids(), gptq=gptq, state=tmp_path)  # as in another process
    assert loaded.weights == expected.weights
    assert len(rounded) == 4


def test_the_state_of_another_calibration_is_refused(tmp_path):
    quarot_fx.calibrate(decoder(), ids(), state=tmp_path)
    with pytest.raises(CalibrationStateError, match=r"begun with w_bits=4, not 3. Give an empty folder"):
        quarot_fx.calibrate(decoder(), ids(), state=tmp_path, w_bits=3)
    with pytest.raises(CalibrationStateError, match=r"begun with act_order=True, not False"):
        quarot_fx.calibrate(decoder(), ids(), state=tmp_path, gptq={"act_order": False})
    with pytest.raises(CalibrationStateError, match=r"begun with tokens="):
        quarot_fx.calibrate(decoder(), ids(seed=1), state=tmp_path)
    with pytest.raises(CalibrationStateError, match=r"step 0, .*block.query.weight.*, was about other weights"):
        quarot_fx.calibrate(decoder(seed=1), ids(), state=tmp_path)
    quarot_fx.calibrate(decoder(), ids(), state=tmp_path, kernels="none")  # which changes no code


# -- data ----------------------------------------------------------------------------------------------


def by_characters(text, **_):
    return type("Encoding", (), {"input_ids": torch.tensor([[ord(character) % 16 for character in text]])})


def test_tokens_are_taken_as_they_are():
    expected = ids(4)
    assert torch.equal(calibration_tokens(expected, None, 128, 2048, 0), expected)
    assert torch.equal(calibration_tokens(list(expected), None, 128, 2048, 0), expected)
    assert torch.equal(calibration_tokens([expected[:1], expected[1:]], None, 128, 2048, 0), expected)


def test_windows_of_a_text_are_drawn_by_seed(tmp_path):
    (tmp_path / "text.txt").write_text("".join(chr(97 + i % 13) for i in range(165)), encoding="utf-8")
    name = str(tmp_path / "text.txt")
    all_windows = calibration_tokens(name, by_characters, 16, 10, 0)
    assert all_windows.shape == (16, 10)
    first, again, other = (calibration_tokens(name, by_characters, 5, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all((all_windows == window).all(1).any() for window in first)
    calibration = quarot_fx.calibrate(decoder(), name, tokenizer=by_characters, samples=5, length=10)
    assert (calibration.sequences, calibration.length) == (5, 10)


def test_mistakes_in_data_are_typed(tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 10, encoding="utf-8")
    name = str(tmp_path / "text.txt")
    cases = [
        ([ids(1, 4)[0], ids(1, 5)[0]], None, r"shapes \[4\], \[5\]. Cut them to one length"),
        ([], None, "shapes nothing"),
        (torch.randn(2, 3), None, "tokens are torch.float32. Give token ids"),
        (name, None, "is a text, and there is no tokenizer"),
        (name, by_characters, "has 3 windows of 10 tokens, not 5. Ask for fewer samples"),
    ]
    for data, tokenizer, message in cases:
        with pytest.raises(CalibrationDataError, match=message):
            calibration_tokens(data, tokenizer, 5, 10, 0)
    with pytest.raises(NotFoundError, match="Give a text file, 'wikitext2', 'c4'"):
        calibration_tokens(str(tmp_path / "none.txt"), by_characters, 5, 10, 0)


def test_a_dataset_needs_its_library_and_is_read_from_its_train_split(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="quarot-fx"):
        calibration_tokens("wikitext2", by_characters, 5, 10, 0)

    class Rows(dict):
        column_names = ("text",)

    def load_dataset(path, name=None, split=None):
        assert (path, name, split) in (("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), ("me/mine", "a", "train"))
        return Rows(text=["abc" * 10, "def" * 10])

    datasets = type("datasets", (), {"load_dataset": staticmethod(load_dataset)})
    monkeypatch.setitem(__import__("sys").modules, "datasets", datasets)
    assert calibration_tokens("wikitext2", by_characters, 5, 10, 0).shape == (5, 10)
    assert calibration_tokens("me/mine:a", by_characters, 5, 10, 0).shape == (5, 10)
    with pytest.raises(NotFoundError, match="found no text 'wikitext'"):
        calibration_tokens("wikitext", by_characters, 5, 10, 0)


def test_the_report_is_data(tmp_path):
    calibration = quarot_fx.calibrate(decoder(), ids(), gptq={"damping": 0, "max_damping": 0.5}, **WEIGHTS_ONLY)
    record = json.loads(json.dumps(calibration.as_dict()))
    assert record["weights"][0]["parameter"] == "block.query.weight"
    assert record["gptq"]["damping"] == 0
    assert "24 x 12 tokens" in str(calibration)
