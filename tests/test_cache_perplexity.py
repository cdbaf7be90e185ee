"""Perplexity of a text that comes in chunks through a cache of few bits: that of one pass without a cache.

A number at the border of its code may be rounded either way, by the order of a sum in float32. On the small trained
model that moves perplexity by less than 1e-4, on a few hundred tokens of SmolLM2 by some 1e-3. In float64 it moves
nothing.
"""

from __future__ import annotations

import copy
import json

import pytest
from caches import SimulatedCache
from commands import run
from models import smollm2
from trained import babyllama, stories

from quarot_fx.cache.options import CacheOptions
from quarot_fx.cli.chunks import InChunks, cache_options
from quarot_fx.cli.models import compile_model
from quarot_fx.cli.perplexity import measure
from quarot_fx.cli.settings import parse_setting
from quarot_fx.errors import OptionError
from quarot_fx.text import read_text, split_windows

pytestmark = pytest.mark.usefixtures("graphs")
COMPILED = [
    ("W4A4KV4", 64),
    pytest.param("KV4", 192, marks=pytest.mark.slow),
    pytest.param("KV4", 100, marks=pytest.mark.slow),
]
ONE_BY_ONE = 24  # tokens of the windows that come so


@pytest.fixture(scope="module")
def trained():
    """A trained model of 5 layers, and windows that it wrote itself."""
    return babyllama(), stories(8, 192)


def perplexity(model, windows):
    return measure(model, windows, "", batch=len(windows)).perplexity


def in_chunks(runnable, model, windows, chunk, setting="KV4"):
    options = cache_options(parse_setting(setting).options)
    return perplexity(InChunks(runnable, model, options, chunk, room=windows.shape[1]), windows)


def simulated(model):
    """The model as it is, with keys and values that are rounded by the same ops, in one pass."""
    return lambda input_ids, use_cache: model(input_ids=input_ids, past_key_values=SimulatedCache(model))


@pytest.mark.parametrize(("setting", "chunk"), COMPILED)
def test_compiled(trained, setting, chunk):
    model, windows = trained
    compiled = compile_model(model, parse_setting(setting), "eager")
    expected = perplexity(compiled, windows)
    assert in_chunks(compiled, model, windows, chunk) == pytest.approx(expected, abs=1e-3)
    assert expected > perplexity(model, windows) + 0.02  # what few bits cost is far more than what is allowed


def test_uncompiled(trained):
    """A graph that simulates the cache, the model with a simulated one, and with the cache itself say one number."""
    model, windows = trained
    compiled = compile_model(model, parse_setting("KV4"), "eager")
    expected = perplexity(compiled, windows)
    assert perplexity(simulated(model), windows) == pytest.approx(expected, abs=1e-3)
    for chunk in (192, 100, 64):
        assert in_chunks(model, model, windows, chunk) == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_token_by_token(trained):
    model, windows = trained
    windows = windows[:, :ONE_BY_ONE]
    compiled = compile_model(model, parse_setting("W4A4KV4"), "eager")
    assert in_chunks(compiled, model, windows, 1) == pytest.approx(perplexity(compiled, windows), abs=1e-3)


def test_the_cache_is_what_a_setting_says(trained):
    model, windows = trained
    found = [in_chunks(model, model, windows, 64, setting) for setting in ("KV16", "KV4", "K4V2", "KV4-norot")]
    assert found[0] == pytest.approx(perplexity(model, windows), abs=1e-4)
    assert min(abs(a - b) for place, a in enumerate(found) for b in found[:place]) > 0.01
    assert cache_options(None) == CacheOptions(kv_bits=16)
    options = parse_setting("K3V5-norot", {"kv_group": 32, "k_clip": 0.9, "v_clip": 0.8}).options
    assert cache_options(options) == CacheOptions(3, 5, group=32, k_clip=0.9, v_clip=0.8, rotation="none")
    with pytest.raises(OptionError, match="kv_sym=True: codes of a cache have a zero point"):
        cache_options(parse_setting("KV4", {"kv_sym": True}).options)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["KV4", "W4A4KV4"])
def test_smollm2(setting):
    model, tokenizer = smollm2()
    windows = split_windows(read_text("pydoc"), tokenizer, length=512, count=2)
    compiled = compile_model(model, parse_setting(setting), "eager")
    expected = perplexity(compiled, windows)
    assert in_chunks(compiled, model, windows, 128) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_smollm2_in_float64():
    shared, tokenizer = smollm2()
    model = copy.deepcopy(shared).double()
    windows = split_windows(read_text("pydoc"), tokenizer, length=256, count=1)
    expected = perplexity(compile_model(model, parse_setting("KV4"), "eager"), windows)
    assert in_chunks(model, model, windows, 64) == pytest.approx(expected, rel=1e-6)


# -- the command -----------------------------------------------------------------------------------


def test_eval_in_chunks(tiny_folder, tmp_path):
    file = tmp_path / "out.json"
    shape = ("--windows", 3, "--window-length", 32, "--batch", 2, "--settings", "float,W4A4KV4")
    run("eval", tiny_folder, *shape, "--chunk", 12, "--json", file)
    record = json.loads(file.read_text())
    run("eval", tiny_folder, *shape, "--json", file)
    expected = json.loads(file.read_text())
    for row, at_once in zip(record["results"], expected["results"], strict=True):
        assert row["perplexity"] == pytest.approx(at_once["perplexity"], rel=1e-3)
        assert "cache" not in at_once
    caches = [row["cache"] for row in record["results"]]
    assert [(one["k_bits"], one["v_bits"], one["chunk"]) for one in caches] == [(16, 16, 12), (4, 4, 12)]
    vectors = 2 * 2 * 2 * 32  # keys and values, sequences, heads, tokens
    assert [one["bytes"] for one in caches] == [vectors * 16 * 4, vectors * (8 + 4 + 1)]


def test_a_setting_whose_cache_there_is_not_is_named(tiny_folder):
    shape = ("--windows", 1, "--window-length", 16, "--settings", "float,KV4", "-o", "kv_sym=True")
    assert "KV4: option kv_sym=True" in run("eval", tiny_folder, *shape, "--chunk", 8, exit_code=1)
    tasks = ("--tasks", "piqa", "--chunk", 8)
    assert "chunk=8: is about a text: name one" in run("eval", tiny_folder, *tasks, exit_code=1)
