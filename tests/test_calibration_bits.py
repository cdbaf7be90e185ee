"""Bits of layers within a budget: the best choice there is, of what was measured, and used wherever codes are made."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibration import decoder, ids, trained  # noqa: F401  a fixture
from torch import nn
from trained import divergence

import quarot_fx
from quarot_fx.calibration import bits as bits_module
from quarot_fx.calibration.knapsack import choose
from quarot_fx.calibration.sensitivity import Sensitivity
from quarot_fx.errors import BitsBudgetError, CalibrationStateError, OptionError

NEAREST = {"w_rounding": "nearest"}
WEIGHTS_ONLY = {"a_bits": 16, "kv_bits": 16}
UNROTATED = {**NEAREST, **WEIGHTS_ONLY, "rotation": "none"}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- the knapsack ------------------------------------------------------------------------------------


CHOICES = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 10)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(items=st.lists(CHOICES, min_size=1, max_size=5), budget=st.integers(0, 120))
def test_the_choice_is_the_best_of_all(items, budget):
    costs, losses = [[cost for cost, _ in item] for item in items], [[loss for _, loss in item] for item in items]
    every = itertools.product(*(range(len(item)) for item in items))
    totals = [tuple(sum(rows[i][c] for i, c in enumerate(one)) for rows in (costs, losses)) for one in every]
    feasible = [loss for cost, loss in totals if cost <= budget]
    found = choose(costs, losses, budget)
    assert (found is None) == (not feasible)
    if found is not None:
        assert sum(of_item[choice] for of_item, choice in zip(costs, found, strict=True)) <= budget
        chosen = sum(of_item[choice] for of_item, choice in zip(losses, found, strict=True))
        assert chosen == pytest.approx(min(feasible), rel=1e-8, abs=1e-12)


def test_a_large_model_of_odd_sizes_is_solved():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**6, 10**8, (600,), generator=generator).tolist()
    widths = (2, 3, 4, 5, 6, 8)
    weights = (torch.rand(600, generator=generator) ** 4).tolist()
    costs = [[size * bits // 8 for bits in widths] for size in sizes]
    losses = [[weight * 4.0**-bits for bits in widths] for weight in weights]
    budget = int(sum(sizes) * 4.25 / 8)
    found = choose(costs, losses, budget)
    spent = sum(of_item[choice] for of_item, choice in zip(costs, found, strict=True))
    assert 0.9999 * budget < spent <= budget
    uniform = sum(of_item[widths.index(4)] for of_item in losses)
    assert sum(of_item[choice] for of_item, choice in zip(losses, found, strict=True)) < 0.7 * uniform


# -- a model -----------------------------------------------------------------------------------------


def test_a_trained_model_predicts_better_than_with_as_many_bits_everywhere(trained):  # noqa: F811
    model, tokens = trained
    rows = 16 / 128  # bits of the scales of most rows
    plain = {**NEAREST, **WEIGHTS_ONLY}
    found = quarot_fx.calibrate(model, tokens[:8], bits_budget=4 + rows, bits_choices=(2, 3, 4, 5, 6, 8), **plain)
    assert found.bits_per_weight <= 4 + rows
    assert divergence(model, tokens[16:], **found.options) < 0.95 * divergence(model, tokens[16:], **plain)


@pytest.mark.parametrize("budget", [5.2, 6.3, 7.01, 20])
def test_the_budget_is_kept_and_nothing_better_would_keep_it(budget):
    found = quarot_fx.calibrate(decoder(), ids(4), bits_budget=budget, bits_choices=(3, 4, 8), **NEAREST)
    weights = sum(one.weights for one in found.bits)
    assert weights == sum(p.numel() for name, p in decoder().block.named_parameters() if "norm" not in name)
    assert found.bits_per_weight <= budget
    of_all = itertools.product(*(one.choices for one in found.bits))
    feasible = [one for one in of_all if 8 * sum(choice.bytes for choice in one) <= budget * weights]
    least = min(sum(choice.divergence for choice in one) for one in feasible)
    assert sum(one.chosen.divergence for one in found.bits) == pytest.approx(least)
    if budget == 20:
        assert {one.bits for one in found.bits} == {8}


def test_layers_that_share_an_input_share_bits_that_reach_the_graph_and_its_report():
    model = decoder()
    found = quarot_fx.calibrate(model, ids(4), bits_budget=8, **WEIGHTS_ONLY)
    names = [[name.removeprefix("block.").removesuffix(".weight") for name in one.parameters] for one in found.bits]
    assert names == [["query", "key", "value"], ["output"], ["gate", "up"], ["down"]]
    assert {one.bits for one in found.bits} == {4, 8}
    options = json.loads(json.dumps(found.options))
    report = quarot_fx.rewrite(model, ids(1), **options).quarot
    bits = {parameter: one.bits for one in found.bits for parameter in one.parameters}
    assert {one.parameter: one.w_bits for one in report.linears if not one.role} == bits
    assert {one.rounding for one in report.linears if not one.role} == {"gptq"}
    assert all(f"{one.chosen.bytes:,}" in str(found) for one in found.bits)
    assert json.loads(json.dumps(found.as_dict()))["bits"][0]["bits"] in (4, 8)


def test_divergences_are_those_of_one_group_alone():
    model, tokens = decoder(), ids(6)
    found = quarot_fx.calibrate(model, tokens, bits_budget=20, bits_choices=(2, 4), **UNROTATED)
    expected = model(tokens).log_softmax(-1)
    for one in found.bits:
        for choice in one.choices:
            overrides = {"*": "skip", **{parameter: {"w_bits": choice.bits} for parameter in one.parameters}}
            options = {**UNROTATED, "overrides": overrides}  # what is skipped would be rotated otherwise
            actual = quarot_fx.rewrite(model, tokens, **options)(tokens)[0].log_softmax(-1)
            by_hand = nn.functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1).mean()
            assert choice.divergence == pytest.approx(by_hand.item(), rel=1e-3, abs=1e-7)


def test_bytes_are_those_of_the_checkpoint(tmp_path):
    found = quarot_fx.calibrate(model := decoder(), ids(4), bits_budget=15, w_group=4, w_sym=False)
    quarot_fx.save(model, tmp_path, ids(2), **found.options)
    index = json.loads(next(tmp_path.glob("*.index.json")).read_text())["metadata"]["quarot"]
    names = [name for one in index["codes"] for name in (one["packed"], one["scale"], one["zero"])]
    widths = {"U8": 1, "BF16": 2}
    stored = sum(math.prod(one["shape"]) * widths[one["dtype"]] for one in map(index["tensors"].get, names))
    assert stored == sum(one.chosen.bytes for one in found.bits)
    loaded = quarot_fx.load(tmp_path, model=decoder(seed=1), nested_backend="eager")
    expected = quarot_fx.rewrite(model, ids(2), **found.options)(ids(2))[0]
    torch.testing.assert_close(loaded(ids(2)), expected, rtol=1e-4, atol=1e-5)


def test_bits_that_overrides_give_stay():
    own = {"*.down": {"w_bits": 5}, "*.up": {"w_sym": False}, "*.query": "skip"}
    found = quarot_fx.calibrate(model := decoder(), ids(4), bits_budget=9, overrides=own, **NEAREST, **WEIGHTS_ONLY)
    by_name = {parameter: one for one in found.bits for parameter in one.parameters}
    assert "block.query.weight" not in by_name
    assert (by_name["block.down.weight"].bits, len(by_name["block.down.weight"].choices)) == (5, 1)
    report = quarot_fx.rewrite(model, ids(1), **found.options).quarot
    bits = {one.parameter: one.w_bits for one in report.linears}
    assert (bits["block.down.weight"], bits["block.query.weight"]) == (5, 16)
    config = quarot_fx.QuarotConfig.from_options(found.options)
    assert not config.for_parameter("block.up.weight").w_sym


def test_with_clip_ratios_of_all_kinds():
    clips = {"w_clip": "output", "a_clip": "output", "kv_clip": "search"}
    found = quarot_fx.calibrate(model := decoder(), ids(4), bits_budget=6.5, **clips)
    assert (len(found.bits), len(found.inputs), len(found.caches)) == (4, 4, 2)
    rewritten = quarot_fx.rewrite(model, ids(1), **found.options)
    assert rewritten(ids(1))[0].isfinite().all()
    layers = [one for one in rewritten.quarot.linears if not one.role]
    assert {one.parameter: (one.w_bits, one.a_clip) for one in layers} == {
        parameter: (one.bits, clipped.clip)
        for one, clipped in zip(found.bits, found.inputs, strict=True)
        for parameter in one.parameters
    }


# -- resuming ----------------------------------------------------------------------------------------


def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch):
    options = {"bits_budget": 6.5, "bits_choices": (3, 4, 8)}
    expected = quarot_fx.calibrate(decoder(), ids(4), **options)
    measured = []

    class Interrupted(Sensitivity):
        def divergence(self, weights):
            measured.append(weights)
            if len(measured) == 8:
                raise KeyboardInterrupt
            return super().divergence(weights)

    monkeypatch.setattr(bits_module, "Sensitivity", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        quarot_fx.calibrate(decoder(), ids(4), state=tmp_path, **options)
    resumed = quarot_fx.calibrate(decoder(), ids(4), state=tmp_path, **options)
    assert len(measured) == 8 + 2 * 3  # two of four groups were known
    assert (resumed.bits, resumed.options, resumed.weights) == (expected.bits, expected.options, expected.weights)
    with pytest.raises(CalibrationStateError, match=r"begun with bits_budget=6.5, not 7"):
        quarot_fx.calibrate(decoder(), ids(4), state=tmp_path, bits_budget=7, bits_choices=(3, 4, 8))


# -- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"bits_budget": 3.5},
            BitsBudgetError,
            r"bits_budget=3.5 cannot be met: with its scales a weight takes 5.04\d+ bits",
        ),
        ({"bits_budget": 9, "w_bits": 16, "overrides": {"*": "skip"}}, BitsBudgetError, "no linear layer is quantised"),
        ({"bits_budget": 0}, OptionError, "bits_budget=0: must be a positive number"),
        ({"bits_budget": "4"}, OptionError, "bits_budget='4': must be a positive number"),
        ({"bits_budget": 5, "bits_choices": (4, 9)}, OptionError, "bits_choices=9: must be 2 to 8"),
        ({"bits_budget": 5, "bits_choices": (4, 16)}, OptionError, "bits_choices=16: must be 2 to 8"),
        ({"bits_budget": 5, "bits_choices": ()}, OptionError, "must name a width"),
    ],
)
def test_mistakes_are_typed(options, error, message):
    with pytest.raises(error, match=message):
        quarot_fx.calibrate(decoder(), ids(2), **options)
