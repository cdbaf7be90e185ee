"""The plug-in for transformers: ``from_pretrained`` and ``save_pretrained``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from models import random_token_ids, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache
from transformers.quantizers.auto import AutoHfQuantizer

import quarot_fx
from quarot_fx.errors import CheckpointOptionError, CorruptCheckpointError, UnknownOptionError
from quarot_fx.float64 import relative_difference
from quarot_fx.hf import QuarotQuantizationConfig

IDS = random_token_ids()
OPTIONS = {"w_clip": 1.0}
EAGER = {"nested_backend": "eager"}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def one_layer(model_type="llama", **config):
    return tiny_model(model_type, num_hidden_layers=1, **config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of that model, to be read by several tests."""
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("saved")
    quarot_fx.save(one_layer(), folder, **OPTIONS)
    return folder


def compiled(model):
    """Compile again, without a nested compiler, which tests have no time for."""
    torch._dynamo.reset()
    model.compile(backend="quarot", options={**OPTIONS, **EAGER}, dynamic=False)
    return model


def logits(model):
    cache = StaticCache(config=model.config, max_cache_len=32)
    prompt = model(input_ids=IDS, past_key_values=cache).logits
    return torch.cat([prompt, model(input_ids=IDS[:, :1], past_key_values=cache).logits], 1)


@pytest.mark.parametrize(
    ("model_type", "config"), [("llama", {"tie_word_embeddings": True}), ("mixtral", {})], ids=["tied", "experts"]
)
def test_from_pretrained_reads_what_save_wrote(tmp_path, model_type, config):
    expected = logits(compiled(one_layer(model_type, **config)))
    quarot_fx.save(one_layer(model_type, **config), tmp_path, **OPTIONS)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.quantization_config.quarot.w_clip == 1.0
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == bool(config)
    assert model._compiled_call_impl is not None
    actual = logits(compiled(model))
    if model_type == "mixtral":  # where weights lie decides, on some processors, how products are added up
        assert relative_difference([actual], [expected]) < 1e-5
    else:
        assert torch.equal(actual, expected)


def test_a_model_is_quantised_while_it_is_loaded_and_saved(tmp_path):
    one_layer().save_pretrained(tmp_path / "original")
    expected = logits(compiled(one_layer()))
    config = QuarotQuantizationConfig(**OPTIONS, **EAGER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    clips = {"a_clip": 0.9, "k_clip": 0.95, "v_clip": 0.95}  # written although they are the default's, which may change
    assert written["quantization_config"] == {"quant_method": "quarot", **OPTIONS, **clips}
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compiled(again)), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(compiled(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))), expected)


def test_what_is_pushed_to_the_hub_is_a_checkpoint(saved, tmp_path, monkeypatch):
    model = compiled(AutoModelForCausalLM.from_pretrained(saved))
    expected = logits(model)
    pushed = []
    monkeypatch.setattr(model, "push_to_hub", lambda repo_id, **kwargs: pushed.append((repo_id, kwargs)))
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/tiny", private=True)
    assert pushed == [("me/tiny", {"private": True})]
    assert torch.equal(logits(compiled(AutoModelForCausalLM.from_pretrained(tmp_path))), expected)


def test_generate_never_runs_what_is_left_of_the_originals(saved):
    """With a compile config transformers would compile decoding anew, around the weights that are not there."""
    settings = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = compiled(one_layer()).generate(IDS, **settings)
    model = compiled(AutoModelForCausalLM.from_pretrained(saved))
    config = GenerationConfig(**settings, eos_token_id=2, pad_token_id=0)
    assert torch.equal(model.generate(IDS, generation_config=config), expected)


def test_a_damaged_checkpoint(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_several_devices(saved):
    with pytest.raises(CheckpointOptionError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(saved, device_map={"model": "cpu", "lm_head": "disk"})


def test_an_option_that_there_is_not():
    with pytest.raises(UnknownOptionError, match="Did you mean 'w_bits'"):
        QuarotQuantizationConfig(w_bit=4)


def test_the_config_survives_its_file():
    config = QuarotQuantizationConfig(
        w_bits=8, overrides={"*.gate": "skip"}, disabled_passes=("fold-means",), nested_backend="eager"
    )
    again = QuarotQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again.quarot == config.quarot.of_weights()
    assert isinstance(AutoHfQuantizer.from_config(again.to_dict(), pre_quantized=False), quarot_fx.hf.QuarotQuantizer)


def test_importing_quarot_fx_imports_no_transformers():
    code = "import sys, quarot_fx; quarot_fx.save, quarot_fx.load; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
