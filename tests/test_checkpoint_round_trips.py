"""What is loaded computes what was saved, bit for bit, and of nothing but what is in the folder."""

from __future__ import annotations

import json

import pytest
import torch
from graphs import Decoder, fill
from models import random_token_ids
from models import tiny_model as tiny_model_of_two_layers
from safetensors.torch import load_file
from transformers import StaticCache

import quarot_fx
from quarot_fx.checkpoint.shards import INDEX
from quarot_fx.errors import CheckpointOptionError, NotInCheckpointError, OriginalsFreedError, SaveError
from quarot_fx.learning.rotations import LearnedRotations

EAGER = {"nested_backend": "eager"}
IDS = random_token_ids(2)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def tiny_model(model_type, **config):
    layers = 2 if model_type == "gemma2" else 1  # whose attention differs
    return tiny_model_of_two_layers(model_type, **{"num_hidden_layers": layers, **config})


def logits(model):
    """Logits of a prompt without a cache, and of the same prompt and a token with a static one."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    return [
        model(input_ids=IDS, use_cache=False).logits,
        model(input_ids=IDS, past_key_values=cache).logits,
        model(input_ids=IDS[:, :1], past_key_values=cache).logits,
    ]


def prompt_logits(model):
    """Logits of a prompt without a cache, for which one graph is compiled and not three."""
    return [model(input_ids=IDS, use_cache=False).logits]


def compiled(model, **options):
    model.compile(backend="quarot", options={**EAGER, **options}, dynamic=False)
    return model


def assert_equal(actual, expected):
    assert all(one.isfinite().all() for one in expected)
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(expected)


def load(folder, model=None, **options):
    torch._dynamo.reset()
    return quarot_fx.load(folder, model, dynamic=False, **EAGER, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a tiny Llama, to be read by several tests."""
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("saved")
    quarot_fx.save(tiny_model("llama"), folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    """Logits of the same model, compiled."""
    torch._dynamo.reset()
    with torch.no_grad():
        return logits(compiled(tiny_model("llama")))


def test_learned_rotations_are_in_the_checkpoint(tmp_path, monkeypatch):
    """Also those that a cache of real numbers makes a graph apply online."""
    model = tiny_model("llama")
    learned = quarot_fx.learn_rotations(model, IDS, learning={"steps": 1, "batch": 2, "rate": 0.3})
    folder, again = tmp_path / "checkpoint", tmp_path / "again"
    expected = logits(compiled(model, learned_rotations=learned))
    quarot_fx.save(model, folder)
    assert "learned_rotations" not in json.loads((folder / "config.json").read_text())["quantization_config"]
    monkeypatch.setattr("quarot_fx.learning.rotations._KNOWN", {})  # as in another process
    monkeypatch.setattr("quarot_fx.rotation._GIVEN", given := {})
    loaded = load(folder)
    assert len(given) == len(learned) == 2
    assert_equal(logits(loaded), expected)
    quarot_fx.save(loaded, again)
    assert_equal(logits(load(again)), expected)
    with pytest.raises(CheckpointOptionError, match="it was made with learned_rotations='learned-"):
        load(folder, learned_rotations=LearnedRotations(learned.rotations[:1]))


@pytest.mark.parametrize(
    ("model_type", "config", "options"),
    [
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {}, {"w_group": 16, "w_sym": False, "overrides": {"lm_head": {"w_bits": 8}, "*.gate_proj": "skip"}}),
        pytest.param(
            *("qwen2", {}, {"rotation": "random", "seed": 3, "w_bits": 3, "kernels": "reference"}),
            marks=pytest.mark.slow,
        ),
        pytest.param("gemma2", {}, {}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, {}, marks=pytest.mark.slow),
        ("mixtral", {}, {}),
    ],
    ids=["tied", "groups", "kernels", "other weights with a cache", "transposed", "experts"],
)
def test_logits_are_equal(tmp_path, model_type, config, options):
    expected = logits(compiled(tiny_model(model_type, **config), w_clip=1.0, **options))
    of_weights = {name: value for name, value in options.items() if name != "kernels"}
    quarot_fx.save(tiny_model(model_type, **config), tmp_path, w_clip=1.0, **of_weights)
    of_the_run = {name: value for name, value in options.items() if name == "kernels"}
    assert_equal(logits(load(tmp_path, **of_the_run)), expected)


def test_bfloat16(tmp_path):
    expected = logits(compiled(tiny_model("llama").bfloat16()))
    quarot_fx.save(tiny_model("llama").bfloat16(), tmp_path)
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert_equal(logits(model), expected)


def test_graphs_that_were_compiled_are_saved_with_their_options(tmp_path):
    model = torch.compile(tiny_model("llama"), backend="quarot", options={**EAGER, "w_bits": 8}, dynamic=False)
    expected = logits(model)
    quarot_fx.save(model, tmp_path)
    assert_equal(logits(load(tmp_path, w_bits=8)), expected)


def test_graphs_of_several_options(tmp_path):
    model = tiny_model("llama")
    for bits in (4, 8):
        torch.compile(model, backend="quarot", options={**EAGER, "w_bits": bits, "w_clip": 1.0}, dynamic=False)(IDS)
    with pytest.raises(SaveError, match="2 different sets of options"):
        quarot_fx.save(model, tmp_path)
    quarot_fx.save(model, tmp_path, w_bits=8, w_clip=1.0)
    assert load(tmp_path)(IDS).logits.isfinite().all()


def test_a_model_of_ones_own(tmp_path):
    options = {"w_clip": 1.0}
    expected = torch.compile(fill(Decoder()), backend="quarot", options={**EAGER, **options}, dynamic=False)(IDS % 16)
    quarot_fx.save(fill(Decoder()), tmp_path, IDS % 16, **options)
    with torch.device("meta"):
        skeleton = Decoder()
    assert torch.equal(load(tmp_path, skeleton)(IDS % 16), expected)


def test_what_is_loaded_is_saved_again(tmp_path):
    quarot_fx.save(tiny_model("llama"), tmp_path / "one", w_bits=8, w_clip=1.0)
    quarot_fx.save(load(tmp_path / "one"), tmp_path / "two")
    assert_equal(prompt_logits(load(tmp_path / "two")), prompt_logits(load(tmp_path / "one")))
    one, two = (sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) for name in ("one", "two"))
    assert one == two, "shards are named by their content"


def test_shards(tmp_path, expected):
    quarot_fx.save(tiny_model("llama"), tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / INDEX).read_text())
    assert {name: shard.name for shard in shards for name in load_file(shard)} == index["weight_map"]
    assert_equal(logits(load(tmp_path)), expected)


def test_another_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    quarot_fx.save(tiny_model("llama"), tmp_path, max_shard_size="20KB")
    quarot_fx.save(tiny_model("llama", seed=1), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    expected = prompt_logits(compiled(tiny_model("llama", seed=1)))
    assert_equal(prompt_logits(load(tmp_path)), expected)


def test_only_what_graphs_read_is_stored(saved):
    original = sum(parameter.nbytes for parameter in tiny_model("llama").parameters())
    stored = load_file(next(saved.glob("*.safetensors")))
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    assert stored["model.layers.0.mlp.up_proj.weight.codes"].dtype == torch.uint8
    assert "model.rotary_emb.inv_freq" in stored, "no config says what a buffer holds"
    assert sum(tensor.nbytes for tensor in stored.values()) < original / 2


def test_originals_are_freed_on_the_way(tmp_path, expected):
    model = tiny_model("llama")
    quarot_fx.save(model, tmp_path, free_originals=True)
    assert model.model.layers[0].mlp.up_proj.weight.isnan().all()
    assert_equal(logits(load(tmp_path)), expected)
    torch._dynamo.reset()
    with pytest.raises(OriginalsFreedError, match="was freed"):
        compiled(model)(IDS)


def test_a_model_with_freed_originals_is_saved_from_its_graphs(tmp_path):
    model = compiled(tiny_model("llama"), free_originals=True)
    expected = logits(model)
    quarot_fx.save(model, tmp_path)
    assert_equal(logits(load(tmp_path)), expected)


def test_a_form_that_the_checkpoint_does_not_hold(saved):
    model = load(saved)
    torch._dynamo.reset()
    with pytest.raises(NotInCheckpointError, match=r"weight.*, 8, None, None, True.*It holds.*, 4, None") as caught:
        compiled(model, w_bits=8)(IDS)
    assert caught.value.folder == str(saved)


def test_a_loaded_model_that_is_written_to(saved):
    model = load(saved)
    model(IDS)
    model.load_state_dict(tiny_model("llama").state_dict())
    with pytest.raises(OriginalsFreedError, match=r"loaded without its content, from a checkpoint.*updated in place"):
        model(IDS)


def test_a_loaded_model_cannot_be_checked_against_its_original(saved):
    model = load(saved)
    torch._dynamo.reset()
    with pytest.raises(OriginalsFreedError, match="run in float64"):
        compiled(model, check=True)(IDS)


def test_generate(saved):
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = compiled(tiny_model("llama")).generate(IDS, **settings)
    assert torch.equal(load(saved).generate(IDS, **settings), expected)
