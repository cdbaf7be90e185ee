"""Clip ratios that nobody gives: they follow from the bits, are part of the config, and yield to every other ratio."""

from __future__ import annotations

import pytest
from models import random_token_ids, tiny_model

import quarot_fx
from quarot_fx.cache.options import CacheOptions
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import OptionError

IDS = {"input_ids": random_token_ids(2, 24), "use_cache": False}
OF_FOUR_BITS = {"a_clip": 0.9, "kv_clip": 0.95}


@pytest.mark.parametrize(
    ("bits", "activations", "caches"),
    [(2, 0.9, 0.95), (4, 0.9, 0.95), (5, 0.9, 0.95), (6, 0.95, 1.0), (7, 0.95, 1.0), (8, 1.0, 1.0), (16, 1.0, 1.0)],
)
def test_ratios_follow_from_bits(bits, activations, caches):
    config = QuarotConfig(a_bits=bits, k_bits=bits, v_bits=4)
    assert (config.a_clip, config.k_clip, config.v_clip) == (activations, caches, 0.95)
    assert (config.activation_scheme.clip, config.key_scheme.clip) == (activations, caches)
    options = CacheOptions(k_bits=bits, v_bits=4)
    assert (options.k_clip, options.v_clip) == (caches, 0.95)
    assert CacheOptions(kv_bits=bits).v_clip == QuarotConfig(kv_bits=bits).v_clip == caches


def test_a_ratio_that_is_given_stays():
    config = QuarotConfig(a_bits=8, kv_bits=8, v_clip=0.8, **OF_FOUR_BITS, overrides={"x": {"a_bits": 6}})
    assert (config.a_clip, config.k_clip, config.v_clip) == (0.9, 0.95, 0.95)
    assert config.for_parameter("x.weight").a_clip == 0.9
    assert QuarotConfig(a_bits=8, a_clip="output", overrides={"x": {"a_bits": 6}}).for_parameter("x").a_clip == "output"
    assert (CacheOptions(kv_bits=8, k_clip=0.9).k_clip, CacheOptions(kv_bits=8, k_clip=0.9).v_clip) == (0.9, 1.0)


def test_an_override_of_bits_has_their_ratio():
    overrides = {"eight": {"a_bits": 8}, "own": {"a_bits": 8, "a_clip": 0.7}, "left": "skip", "weight": {"w_bits": 8}}
    config = QuarotConfig(overrides=overrides)
    ratios = {name: config.for_parameter(name).a_clip for name in (*overrides, "other")}
    assert ratios == {"eight": 1.0, "own": 0.7, "left": 0.9, "weight": 0.9, "other": 0.9}
    with pytest.raises(OptionError, match="a_bits=9"):
        QuarotConfig(overrides={"x": {"a_bits": 9}})


def test_options_that_are_kept_name_their_ratios():
    config = QuarotConfig(a_bits=8, k_bits=6, overrides={"x": {"a_bits": 4}})
    kept = config.as_options()
    assert {name: kept[name] for name in ("a_clip", "k_clip", "v_clip")} == {
        "a_clip": 1.0,
        "k_clip": 1.0,
        "v_clip": 0.95,
    }
    assert kept["overrides"]["x"]["a_clip"] == 0.9
    assert QuarotConfig.from_options(kept) == config


@pytest.mark.parametrize("bits", [6, 8])
def test_more_than_four_bits_lose_less_than_with_the_ratios_of_four(bits):
    options = {"w_bits": 16, "a_bits": bits, "kv_bits": bits}
    usual, clipped = (quarot_fx.sqnr(tiny_model("llama"), IDS, **options, **clips) for clips in ({}, OF_FOUR_BITS))
    for ours, theirs in zip(usual.caches, clipped.caches, strict=True):
        assert ours.sqnr > theirs.sqnr + 3
    gains = [ours.activation - theirs.activation for ours, theirs in _quantized(usual, clipped)]
    assert sum(gains) / len(gains) > {6: 1, 8: 6}[bits]


def _quantized(*reports):
    layers = zip(*(report.layers for report in reports), strict=True)
    return [pair for pair in layers if pair[0].activation is not None]
