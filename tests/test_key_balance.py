"""Keys balanced against queries: the same numbers unquantised, better ones with few bits, with a cache and without."""

from __future__ import annotations

import pytest
import tiny_decoders
import torch
from architectures import compile_model
from caches import double_model, in_double, logits_in_chunks, make
from graphs import Lambda, captured, linear, reasons, rewritten, tokens
from models import random_token_ids, tiny_model
from trained import babyllama, stories

import quarot_fx
from quarot_fx import ops
from quarot_fx.balance import Balance, KeyBalance, KeyBalances
from quarot_fx.calibration.key_balance import balancing
from quarot_fx.cli.models import compile_model as compile_setting
from quarot_fx.cli.perplexity import measure
from quarot_fx.cli.settings import parse_setting
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import (
    BalanceSizeError,
    CalibrationStateError,
    KeyBalanceNotCalibratedError,
    KeyBalancesFileError,
    NotABalanceError,
    OptionError,
    UnknownBalanceError,
)
from quarot_fx.float64 import relative_difference
from quarot_fx.passes.balance_keys import BalanceKeys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
IDS = random_token_ids(2, 14)
EXACT = {"w_bits": 16, "a_bits": 16}
NAMES = ("llama", "qwen3", "phi3", "gpt_neox", "gpt2")
SPELLINGS = [*((name, spelling) for name in NAMES for spelling in ("sdpa", "eager")), ("gemma2", "eager")]


def definite(*shape, seed=0):
    """Positive definite matrices, float64."""
    roots = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return roots @ roots.mT / shape[-1] + 0.05 * torch.eye(shape[-1])


# With windows; layers that read keys of others, with windows and without; attention beside convolutions.
OTHER_KINDS = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def with_layers_of_other_kinds(name, monkeypatch):
    monkeypatch.setitem(tiny_decoders.DATA["corrections"], name, {"config": OTHER_KINDS[name]})
    return tiny_decoders.build(name).model


def found_for(model, **options):
    return quarot_fx.calibrate(model, IDS, w_rounding="nearest", key_balance="search", **options)


# -- the matrices ----------------------------------------------------------------------------------


def noise(matrix, keys, queries):
    inverse = torch.linalg.inv(matrix)
    after = (matrix @ keys @ matrix).trace() * (inverse @ queries @ inverse).trace()
    return (after / keys.trace() / queries.trace()).item()


def test_balancing_has_the_least_noise():
    keys, queries = definite(8, 8), definite(8, 8, seed=1) * torch.arange(1, 9)[:, None] * torch.arange(1, 9)
    matrix, ratio = balancing(keys, queries)
    assert ratio.item() == pytest.approx(noise(matrix, keys, queries))
    assert ratio < 0.9
    others = [matrix + 0.01 * definite(8, 8, seed=seed) * sign for seed in range(2, 8) for sign in (1, -1)]
    assert all(noise(other, keys, queries) > ratio for other in others)


def test_balancing_does_nothing_where_nothing_is_to_be_gained():
    matrix, ratio = balancing(torch.zeros(4, 4, dtype=torch.float64), 3 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(matrix / matrix[0, 0], torch.eye(4, dtype=torch.float64))
    assert ratio.item() == pytest.approx(1)


def test_moments_of_few_directions():
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix, _ = balancing(x.mT @ x, definite(4, 4))
    assert matrix.isfinite().all()
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_scores_stay():
    balance = str(Balance.of_matrices(definite(2, 8, 8)))
    keys, queries = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 6, 5, 8, dtype=torch.float64)
    scores = queries @ keys.repeat_interleave(3, 1).mT
    balanced = ops.balance(queries, balance, True) @ ops.balance(keys, balance).repeat_interleave(3, 1).mT
    torch.testing.assert_close(balanced, scores)
    torch.testing.assert_close(ops.balance(ops.balance(keys, balance), balance, True), keys)


@pytest.mark.parametrize(
    ("matrices", "reason"),
    [
        (torch.eye(4), "their shape is"),
        (torch.ones(1, 2, 2).triu(), "not symmetric"),
        (-torch.eye(2)[None], "not positive definite"),
        (torch.full((1, 2, 2), torch.nan), "not symmetric"),
    ],
)
def test_what_balances_nothing(matrices, reason):
    with pytest.raises(NotABalanceError, match=reason):
        Balance.of_matrices(matrices)


def test_unknown_and_unfit():
    balance = str(Balance.of_matrices(definite(2, 8, 8)))
    with pytest.raises(BalanceSizeError, match="of size 8, 2 of them"):
        ops.balance(torch.ones(1, 3, 5, 8), balance)
    for name in ("balance-2x8-0123456789abcdef", "balance-x"):
        with pytest.raises(UnknownBalanceError, match="not known in this process"):
            ops.balance(torch.ones(1, 2, 5, 8), name)


def test_folder(tmp_path):
    balances = KeyBalances([KeyBalance(f"layers.{i}", str(Balance.of_matrices(definite(2, 8, 8)))) for i in range(2)])
    balances.save(tmp_path)
    assert KeyBalances.load(tmp_path) == balances
    assert QuarotConfig(key_balance=tmp_path).key_balance == balances.name
    with pytest.raises(KeyBalancesFileError, match="cannot load"):
        KeyBalances.load(tmp_path / "none")
    (tmp_path / "key_balances.safetensors").write_bytes(b"nothing")
    with pytest.raises(KeyBalancesFileError, match="cannot load"):
        KeyBalances.load(tmp_path)


def test_balances_are_found_once(tmp_path, monkeypatch):
    """A calibration that goes on has those that it began with, in another process, too."""
    model = tiny_model("llama")
    expected = found_for(model, state=tmp_path)
    monkeypatch.setattr("quarot_fx.balance._KNOWN", {})
    monkeypatch.setattr("quarot_fx.balance._GIVEN", {})
    monkeypatch.setattr("quarot_fx.calibration.calibrate.find_key_balances", pytest.fail)
    resumed = found_for(model, state=tmp_path)
    assert resumed.options == expected.options
    assert resumed.keys == expected.keys
    (tmp_path / "key_balances.safetensors").unlink()
    with pytest.raises(KeyBalancesFileError, match="cannot load"):
        found_for(model, state=tmp_path)


def test_what_was_found_for_other_weights_is_refused(tmp_path):
    """No code is saved of weights that are rounded to nearest, by which the state could tell models apart."""
    found_for(tiny_model("llama"), state=tmp_path)
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(CalibrationStateError, match="balances of keys: found for other weights"):
        found_for(other, state=tmp_path)


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "implementation"), SPELLINGS)
def test_a_graph_says_the_same(name, implementation):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    found = found_for(model)
    module = quarot_fx.rewrite(model, {"input_ids": IDS, "use_cache": False}, check=True, **found.options)
    report = next(one for one in module.quarot.passes if one.name == BalanceKeys().name)
    layers = model.config.num_hidden_layers
    assert (report.matched, report.declined, len(found.keys)) == (layers, [], layers)
    assert 0 < report.difference < 1e-9
    assert all(0 < one.noise < 1 for one in found.keys)
    nodes = [node for node in module.graph.nodes if node.target is torch.ops.quarot.balance.default]
    assert sorted(node.args[2:] for node in nodes) == sorted([(), (True,)] * layers)


def test_layers_that_read_the_keys_of_others(monkeypatch):
    """They have one balance, and keys are balanced once."""
    model = with_layers_of_other_kinds("gemma3n_text", monkeypatch)
    found = found_for(model)
    module = quarot_fx.rewrite(model, {"input_ids": IDS, "use_cache": False}, check=True, **found.options)
    report = next(one for one in module.quarot.passes if one.name == BalanceKeys().name)
    assert (len(found.keys), report.matched, report.declined) == (2, 4, [])
    assert 0 < report.difference < 1e-9
    nodes = module.graph.find_nodes(op="call_function", target=torch.ops.quarot.balance.default)
    assert sorted(node.args[2:] for node in nodes) == [(), (), *[(True,)] * 4]


def test_what_cannot_be_balanced_is_named():
    """Heads that are joined with sequences, as for a product of three axes."""

    def forward(m, x):
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2).flatten(0, 1) for layer in (m.q, m.k, m.v))
        return m.o((q @ k.mT).softmax(-1) @ v)

    program = captured(Lambda(forward, q=linear(16), k=linear(16), v=linear(16), o=linear(4, 8)), tokens(2, 5, 16))
    balances = KeyBalances([KeyBalance("", str(Balance.of_matrices(definite(2, 8, 8))))])
    report = rewritten(program, BalanceKeys(QuarotConfig(key_balance=balances))).reports[-1]
    assert report.matched == 0
    assert reasons(report) == [
        "keys are not balanced: attention reads keys of 3 axes, not batch, heads, tokens and size"
    ]


def test_to_be_found():
    with pytest.raises(KeyBalanceNotCalibratedError, match="calibrate"):
        quarot_fx.rewrite(tiny_model("llama"), {"input_ids": IDS, "use_cache": False}, key_balance="search")


def test_keys_of_16_bits_are_left():
    model = tiny_model("llama")
    options = {**found_for(model).options, "k_bits": 16}
    module = quarot_fx.rewrite(model, {"input_ids": IDS, "use_cache": False}, **options)
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.quarot.balance.default)


# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", pytest.param("growing", marks=pytest.mark.slow)])
def test_a_cache_says_what_a_graph_without_one_says(kind):
    """In float64: a prompt, a chunk and a token."""
    model = double_model("llama")
    balance = found_for(model).options["key_balance"]
    compiled = compile_model(model, key_balance=balance, dynamic=True if kind == "growing" else None)
    with torch.no_grad():
        expected = compiled(IDS, use_cache=False).logits
    cache = make(kind, model, 16, 2, key_balance=balance)
    assert relative_difference([logits_in_chunks(compiled, cache, IDS, 10, 3, 1)], [expected]) < 1e-6
    plain = make(kind, model, 16, 2)
    assert relative_difference([logits_in_chunks(compiled, plain, IDS, 10, 3, 1)], [expected]) > 1e-4


@pytest.mark.parametrize("kind", ["static", "growing"])
def test_uncompiled(kind):
    model = double_model("llama")
    balance = found_for(model).options["key_balance"]
    compiled = compile_model(model, key_balance=balance, **EXACT)
    with torch.no_grad():
        expected = compiled(IDS, use_cache=False).logits
    logits = logits_in_chunks(model, make(kind, model, 16, 2, key_balance=balance), IDS, 10, 3, 1)
    assert relative_difference([logits], [expected]) < 1e-6


@pytest.mark.parametrize("tokens", [10, 1])
def test_queries_are_balanced_and_not_the_whole_cache(tokens):
    model = double_model("llama")
    cache = make("static", model, 16, 2, key_balance=found_for(model).options["key_balance"])
    if tokens == 1:
        logits_in_chunks(model, cache, IDS[:, :10], 10)
    inputs = {"input_ids": IDS[:, :tokens], "past_key_values": cache}
    module = quarot_fx.rewrite(model, inputs, check=True)
    nodes = module.graph.find_nodes(op="call_function", target=torch.ops.quarot.balance.default)
    heads = [(node.meta["val"].shape[1], node.meta["val"].shape[2]) for node in nodes]
    config = model.config
    assert heads == [(config.num_key_value_heads, tokens), (config.num_attention_heads, tokens)] * 2
    differences = {one.name: one.difference for one in module.quarot.passes}
    assert max(differences[name] for name in ("balance-keys", "place-rotations", "rotate")) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_caches_of_layers_of_other_kinds(name, kind, monkeypatch):
    model = in_double(with_layers_of_other_kinds(name, monkeypatch))
    balance = found_for(model).options["key_balance"]
    with torch.no_grad():
        expected = compile_model(model, key_balance=balance, **EXACT)(IDS, use_cache=False).logits
    cache = make(kind, model, 32, 2, key_balance=balance)
    assert relative_difference([logits_in_chunks(model, cache, IDS, 10, 3, 1)], [expected]) < 1e-6
    cache.reset()
    for count in (10, 1):
        module = quarot_fx.rewrite(model, {"input_ids": IDS[:, :count], "past_key_values": cache}, **EXACT)
        nodes = module.graph.find_nodes(op="call_function", target=torch.ops.quarot.balance.default)
        assert nodes
        assert all(node.meta["val"].shape[2] == count for node in nodes)  # of the cache nothing is brought back
        logits_in_chunks(model, cache, IDS[:, :10], 10)


@pytest.mark.slow
def test_a_cache_of_latent_vectors():
    model = tiny_decoders.build("minicpm3").model
    balance = found_for(model).options["key_balance"]
    with pytest.raises(BalanceSizeError, match="latent vectors, has none"):
        make("static", model, 16, 2, key_balance=balance)


def test_a_cache_of_another_model():
    model = tiny_model("llama")
    balance = found_for(tiny_model("llama", num_hidden_layers=1)).options["key_balance"]
    with pytest.raises(OptionError, match="of 1 layers, and the cache stores keys of 2"):
        make("static", model, 16, key_balance=balance)
    with pytest.raises(OptionError, match="calibration finds one"):
        make("static", model, 16, key_balance="search")


# -- checkpoints, and what it is good for ----------------------------------------------------------


def test_checkpoint(tmp_path, monkeypatch):
    model = tiny_model("llama")
    options = found_for(model).options
    quarot_fx.save(model, tmp_path, {"input_ids": IDS, "use_cache": False}, **options)
    with torch.no_grad():
        expected = compile_model(model, **options)(IDS, use_cache=False).logits
    name = KeyBalances.known(options["key_balance"]).name
    monkeypatch.setattr("quarot_fx.balance._KNOWN", {})
    monkeypatch.setattr("quarot_fx.balance._GIVEN", {})
    torch._dynamo.reset()
    loaded = quarot_fx.load(tmp_path, dynamic=False, nested_backend="eager")
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, expected)
    assert KeyBalances.known(name).name == name


def test_few_bits_lose_less():
    """Of a trained model, on texts that it was not calibrated on."""
    model, texts = babyllama(), stories(12, 128)
    found = quarot_fx.calibrate(model, texts[:4], **{**EXACT, "k_bits": 3, "v_bits": 16}, key_balance="search")
    measured = {}
    for name, options in {"float": None, "plain": {}, "balanced": found.options}.items():
        setting = parse_setting("float" if options is None else "K3", options)
        runnable = compile_setting(model, setting, nested_backend="eager")
        measured[name] = measure(runnable, texts[4:], name, batch=8).perplexity
    assert measured["balanced"] - measured["float"] < 0.8 * (measured["plain"] - measured["float"])
