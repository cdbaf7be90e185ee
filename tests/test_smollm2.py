"""SmolLM2-135M through the compiled module: where quantisation holds, and where only rotation saves it.

Windows are short to keep the tests short; ``quarot-fx eval smollm2`` follows the paper's protocol.
"""

from __future__ import annotations

import pytest
import torch
from models import smollm2

import quarot_fx
from quarot_fx.cli.models import compile_model
from quarot_fx.cli.perplexity import measure
from quarot_fx.cli.settings import parse_setting
from quarot_fx.text import read_text, split_windows


@pytest.fixture(scope="module")
def perplexity():
    """Perplexity of a setting on two windows of 512 tokens, each setting measured once."""
    model, tokenizer = smollm2()
    windows = split_windows(read_text("pydoc"), tokenizer, length=512, count=2)
    known = {}

    def of(setting):
        if setting not in known:
            runnable = compile_model(model, parse_setting(setting), nested_backend="eager")
            known[setting] = measure(runnable, windows, setting).perplexity
        return known[setting]

    return of


def test_rotation_alone_changes_nothing(perplexity):
    assert perplexity("rotated") / perplexity("float") == pytest.approx(1, abs=1e-4)


def test_four_bits_need_the_rotation(perplexity):
    assert perplexity("W4A4KV4") / perplexity("float") < 10
    assert perplexity("W4A4KV4-norot{w_clip=1.0}") / perplexity("float") > 100  # no search, which takes its time


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "limit"), [("W8A8KV8", 1.02), ("W6A6KV6", 1.12), ("KV4", 1.1)])
def test_more_bits_cost_little(perplexity, setting, limit):
    assert 1 - 0.01 < perplexity(setting) / perplexity("float") < limit


def test_the_plan_is_quarots():
    model, _ = smollm2()
    inputs = {"input_ids": torch.arange(16)[None], "use_cache": False}
    report = quarot_fx.explain(model, inputs, stop_after="place-rotations", check=False)
    layers = model.config.num_hidden_layers
    online = [linear.parameter for linear in report.linears if linear.rotated == "online"]
    assert len(online) == 2 * layers
    assert all("down_proj" in name or "o_proj" in name for name in online)
    free = [linear.parameter for linear in report.linears if linear.rotated == "free"]
    assert len(free) == 5 * layers + 1  # q, k, v, gate and up of every layer, and the output head


@pytest.mark.slow
def test_eight_bits_say_what_float_says_where_it_is_sure():
    """Where two tokens are nearly as likely, any rounding may tip it: an answer as a whole hangs on one such place."""
    model, tokenizer = smollm2()
    windows = split_windows(read_text("pydoc"), tokenizer, length=512, count=1)
    runnable = compile_model(model, parse_setting("W8A8KV8"), nested_backend="eager")
    with torch.no_grad():
        expected, said = (one(input_ids=windows, use_cache=False).logits[0] for one in (model, runnable))
    likeliest, next_to_it = expected.topk(2).values.T
    sure = likeliest - next_to_it > 1
    assert sure.sum() > 200
    assert (said.argmax(-1) == expected.argmax(-1))[sure].float().mean() > 0.98
