"""Which cache a model gets, what it says about itself, and what it says to mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_decoders
import torch
from models import random_token_ids, tiny_model
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from quarot_fx import QuarotCache, errors, generation_cache
from quarot_fx.cache.growing import PAGE, GrowingLayer
from quarot_fx.cache.layer import PackedLayer
from quarot_fx.cache.sliding import GrowingSlidingLayer, StaticSlidingLayer
from quarot_fx.cache.static import StaticLayer

BOTH = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def layer_types(cache):
    return [type(layer) for layer in cache.layers]


# -- which layers ----------------------------------------------------------------------------------


def test_layers_follow_the_config():
    config = tiny_model("gemma3_text", **BOTH).config
    assert layer_types(QuarotCache(config)) == [GrowingSlidingLayer, GrowingLayer]
    assert layer_types(QuarotCache(config, 20)) == [StaticSlidingLayer, StaticLayer]
    short = QuarotCache(config, 8)
    assert layer_types(short) == [StaticLayer, StaticLayer]  # no room for more than the window: nothing slides
    assert short.is_sliding == [True, False]


def test_what_generate_asks_a_cache():
    config = tiny_model("gemma3_text", **BOTH).config
    static, growing = QuarotCache(config, 20), QuarotCache(config)
    assert (static.is_compileable, growing.is_compileable) == (True, False)
    assert (static.is_croppable, growing.is_croppable) == (False, True)
    assert QuarotCache(tiny_model("llama").config, 20).is_croppable
    assert (static.get_max_length(), growing.get_max_length()) == (20, 8)
    assert static.get_seq_length() == growing.get_seq_length() == 0


def test_layers_of_other_kinds_are_those_of_transformers_and_are_named():
    decoder = tiny_decoders.build("jamba")
    for room in (None, 20):
        cache = generation_cache(decoder.model, room)
        ours, other = sorted(cache.report().layers, key=lambda layer: layer.k_bits is None)
        assert (ours.k_bits, ours.v_bits, ours.reason) == (4, 4, "")
        assert (other.kind, other.reason) == (
            "LinearAttentionLayer",
            "it stores a state, not the keys and values of tokens",
        )
        assert other.nbytes == 0
        decoder.model(decoder.inputs["input_ids"], past_key_values=cache, use_cache=True)
        assert cache.report().layers[other.index].nbytes > 0


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_made_early(dtype):
    model = tiny_model("llama").to(dtype)
    cache = generation_cache(model, 24, batch_size=3)
    codes = [layer.packed_keys.parts[0] for layer in cache.layers]
    assert [list(part.shape) for part in codes] == [[3, 2, 24, 8]] * 2
    assert cache.is_initialized
    assert cache.batch_size == 3
    assert {layer.packed_values.dtype for layer in cache.layers} == {dtype}
    assert cache.get_seq_length() == 0


def test_growing_caches_start_with_a_page():
    cache = generation_cache(tiny_model("llama"), kv_bits=8)
    assert cache.layers[0].packed_keys.parts[0].shape == (1, 2, PAGE, 16)


def test_keys_unlike_values_in_size():
    cache = generation_cache(tiny_decoders.build("deepseek_v3").model, 24)
    keys, values = cache.layers[0].packed
    assert keys.size != values.size
    again = QuarotCache(tiny_decoders.build("deepseek_v3").config, 24)
    heads = keys.parts[0].shape[1]
    again.early_initialization(1, heads, keys.size, torch.float32, "cpu", v_head_dim=values.size)
    assert [part.shape for p in again.layers[0].packed for part in p.parts] == [
        part.shape for p in (keys, values) for part in p.parts
    ]


def test_early_initialization_is_that_of_a_static_cache():
    model = tiny_model("gemma3_text", **BOTH)
    ours, plain = QuarotCache(model.config, 24, kv_bits=16), StaticCache(model.config, 24)
    for cache in (ours, plain):
        cache.early_initialization(2, [2, 2], [16, 16], torch.float32, torch.device("cpu"))
    for mine, expected in zip(ours.layers, plain.layers, strict=True):
        assert mine.packed_keys.parts[0].shape == expected.keys.shape
        assert mine.packed_values.parts[0].shape == expected.values.shape


def test_a_compiled_model_runs_its_token_uncompiled(graphs):
    compiled = torch.compile(tiny_model("llama"), backend="eager")
    assert generation_cache(compiled, 24).is_initialized
    assert graphs() == 0


def test_composite_model():
    text = tiny_model("llama").config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=255)
    model = LlavaForConditionalGeneration(config).eval()
    ids = random_token_ids(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options).tolist()
    for room in (None, 24):
        cache = generation_cache(model, room, kv_bits=16)
        assert model.generate(ids, past_key_values=cache, **options).tolist() == expected
        assert [isinstance(layer, PackedLayer) for layer in cache.layers] == [True, True]


# -- the report ------------------------------------------------------------------------------------


def test_bytes():
    cache = generation_cache(tiny_model("llama"), 24, batch_size=2)
    tokens = 2 * 2 * 2 * 2 * 24  # keys and values, layers, sequences, heads
    assert cache.nbytes == tokens * (8 + 4 + 1)  # 16 codes, a scale, a zero point
    assert cache.dense_nbytes == tokens * 16 * 2
    assert QuarotCache(tiny_model("llama").config, 24).nbytes == 0


def test_report():
    cache = generation_cache(tiny_model("gemma3_text", **BOTH), 24, k_bits=3)
    report = cache.report()
    assert [(layer.index, layer.kind, layer.k_bits, layer.v_bits) for layer in report.layers] == [
        (0, "window of 8", 3, 4),
        (1, "24 tokens", 3, 4),
    ]
    assert report.as_dict()["nbytes"] == cache.nbytes == sum(layer["nbytes"] for layer in report.as_dict()["layers"])
    text = str(report)
    assert "window of 8" in text
    assert "K3 V4" in text
    assert "1 x (24 tokens)" in repr(cache)
    assert "not from a compiled one" not in text
    model = tiny_model("gemma3_text", **BOTH)
    with torch.no_grad():
        model(random_token_ids(1, 7), past_key_values=cache)
    assert cache.report().uncompiled_tokens == 7
    assert "7 tokens came from the model as it is, not from a compiled one" in str(cache.report())
    cache.reset()
    assert cache.report().uncompiled_tokens == 0
    waiting = QuarotCache(tiny_model("llama").config, 24).report()
    assert {layer.reason for layer in waiting.layers} == {"tensors are made when the first token comes"}
    assert "0-1" in str(waiting)
    assert "nothing is allocated yet" in str(waiting)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k_bit": 4}, errors.UnknownOptionError, "unknown option of a cache 'k_bit'. Did you mean 'k_bits'?"),
        ({"k_bits": 9}, errors.OptionError, "k_bits=9: must be 2 to 8, or 16"),
        ({"kv_bits": 0}, errors.OptionError, "kv_bits=0"),
        ({"v_bits": None}, errors.OptionError, "v_bits=None"),
        ({"group": 0}, errors.OptionError, "group=0: must be a positive integer"),
        (
            {"group": 5},
            errors.GroupSizeError,
            "group=5 does not divide the 16 elements that each of the keys",
        ),
        ({"clip": 0}, errors.OptionError, "clip=0: must be a ratio"),
        ({"k_clip": "search"}, errors.OptionError, "k_clip='search': must be a ratio in (0, 1]: calibration finds one"),
        ({"rotation": "hadamart"}, errors.UnknownOptionError, "Did you mean 'hadamard'?"),
        ({"max_cache_len": 0}, errors.OptionError, "max_cache_len=0: must be 1 or more"),
        ({"batch_size": 0}, errors.OptionError, "batch_size=0: must be 1 or more"),
    ],
    ids=str,
)
def test_options(options, error, message):
    with pytest.raises(error) as caught:
        generation_cache(tiny_model("llama"), **options)
    assert message in str(caught.value)


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))


@pytest.mark.parametrize(
    ("make", "room", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), None, "a Linear: it is not a model of transformers"),
        (tiny_t5, None, "a T5ForConditionalGeneration: its decoder attends to an encoder"),
        (lambda: tiny_decoders.build("minimax").model, None, "it takes no cache but one of its own kind"),
        (lambda: tiny_decoders.build("openai-gpt").model, 20, "it stores nothing in a cache that it is given"),
        (lambda: tiny_decoders.build("mamba").model, None, "none of its layers stores the keys and values of tokens"),
        (lambda: tiny_decoders.build("blt").model, None, "transformers itself makes none of this kind for it"),
        (lambda: tiny_decoders.build("gpt_neo").model, 20, "its masks do not hide room that no token has filled"),
        (lambda: tiny_decoders.build("cpmant").model, 20, "it takes all tokens at every step, not the new ones alone"),
    ],
    ids=["module", "encoder-decoder", "own kind", "none at all", "states alone", "unknown", "own masks", "all tokens"],
)
def test_models_that_get_none(make, room, message):
    with pytest.raises(errors.CacheModelError) as caught:
        generation_cache(make(), room)
    assert message in str(caught.value)


def test_flash_attention_reads_no_masks():
    config = tiny_model("llama").config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(errors.CacheModelError, match=r'flash attention takes no mask.*attn_implementation="sdpa"'):
        QuarotCache(config, 24)
    QuarotCache(config)  # a growing cache has no room that is empty


def test_importing_the_package_imports_no_transformers():
    code = (
        "import sys, quarot_fx; assert 'generation_cache' in dir(quarot_fx); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
