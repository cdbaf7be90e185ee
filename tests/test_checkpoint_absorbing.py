"""Rotations that weights absorb alone: an ordinary model, which computes the same."""

from __future__ import annotations

import pytest
import torch
from graphs import Decoder, fill
from models import random_token_ids, tiny_model
from transformers import AutoModelForCausalLM

import quarot_fx
from quarot_fx.errors import RotationNotAbsorbedError, UnknownOptionError

IDS = random_token_ids(2)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    ("model_type", "gain"), [("llama", 1.0), ("gemma", 0.0), ("qwen3", 1.0), ("phi3", 1.0), ("mixtral", 1.0)]
)
def test_logits_stay_the_same(tmp_path, model_type, gain):
    model = tiny_model(model_type, num_hidden_layers=1, tie_word_embeddings=False)
    before, embedding = model(IDS).logits, model.get_input_embeddings().weight.clone()
    plan = quarot_fx.absorb_rotations(model)
    assert not plan.online
    assert {site.rotated for site in plan.sites if "lm_head" in site.name or "q_proj" in site.name} <= {"free"}
    assert not torch.allclose(model.get_input_embeddings().weight, embedding)
    assert (model.model.norm.weight == gain).all()
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_outliers_of_the_stream_are_gone():
    model = tiny_model("llama", num_hidden_layers=1)
    model.get_input_embeddings().weight[:, 3] *= 100
    peak = lambda: (model(IDS, output_hidden_states=True).hidden_states[0].abs().amax(-1)).mean()  # noqa: E731
    before = peak()
    quarot_fx.absorb_rotations(model)
    assert peak() < before / 3


def test_a_model_of_ones_own():
    model = fill(Decoder())
    ids = torch.arange(10).reshape(2, 5)
    before = model(ids)
    plan = quarot_fx.absorb_rotations(model, ids, rotation="random", seed=1)
    assert any(transform.rotation == "random-16-seed1" for transform in plan.transforms)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("llama", {"tie_word_embeddings": True}, r"embed_tokens\.weight is read in two places"),
        ("gpt2", {}, "cannot absorb a rotation alone"),
        ("gemma2", {"tie_word_embeddings": False}, "cannot absorb a rotation alone"),
    ],
)
def test_what_weights_cannot_absorb_is_an_error_and_changes_nothing(model_type, config, message):
    model = tiny_model(model_type, num_hidden_layers=1, **config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RotationNotAbsorbedError, match=message):
        quarot_fx.absorb_rotations(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_arguments():
    with pytest.raises(RotationNotAbsorbedError, match="Give example inputs"):
        quarot_fx.absorb_rotations(Decoder().eval())
    with pytest.raises(UnknownOptionError, match="rotation 'haar'"):
        quarot_fx.absorb_rotations(Decoder().eval(), torch.arange(5)[None], rotation="haar")
