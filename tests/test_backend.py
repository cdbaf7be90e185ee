"""The public surface: the entry point, options, modes, nested backends, rewrite and explain."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import FileCheck

import quarot_fx
from quarot_fx.errors import NestedBackendError
from quarot_fx.float64 import relative_difference
from quarot_fx.lowering.nested import known_to_inductor


class Model(nn.Module):
    """One attention block and one gated MLP over an embedding, with its head."""

    def __init__(self, hidden: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.table, self.head = nn.Embedding(40, hidden), nn.Linear(hidden, 40, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(3))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, 32, bias=False), nn.Linear(hidden, 32, bias=False)
        self.down = nn.Linear(32, hidden, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        batch, length, hidden = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        h = self.norms[1](x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.norms[2](x))


IDS = torch.arange(24).reshape(2, 12)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def model():
    return Model().eval()


def test_the_backend_works_by_name_with_no_import():
    code = (
        "import torch; m = torch.nn.Linear(8, 8).eval()\n"
        "f = torch.compile(m, backend='quarot', options={'nested_backend': 'eager'})\n"
        "with torch.no_grad(): print(f(torch.ones(2, 8)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([2, 8])" in done.stdout


def test_import_is_light():
    code = "import sys, quarot_fx; print(sorted({'triton', 'transformers', 'torch', 'networkx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("nested", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_nested_backends_agree(model, nested):
    gm = quarot_fx.rewrite(model, IDS, w_clip=1.0)
    out = torch.compile(model, backend="quarot", options={"nested_backend": nested, "w_clip": 1.0}, fullgraph=True)(IDS)
    torch.testing.assert_close(out, gm(IDS)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes_reach_inductor(model, mode):
    out = torch.compile(model, backend="quarot", mode=mode)(IDS)
    torch.testing.assert_close(out, quarot_fx.rewrite(model, IDS)(IDS)[0], rtol=1e-4, atol=1e-4)


def test_options_that_a_version_of_inductor_lacks_are_left_out():
    assert known_to_inductor({"combo_kernels": True, "no_such_option": 1}) == {"combo_kernels": True}


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_rotation_alone_changes_nothing(model, rotation):
    gm = quarot_fx.rewrite(model, IDS, w_bits=16, a_bits=16, kv_bits=16, rotation=rotation)
    assert gm.quarot.plan.transforms
    assert relative_difference([gm(IDS)[0]], [model(IDS)]) < 1e-5


def test_random_rotations_are_absorbed_and_hadamards_run_online(model):
    plan = quarot_fx.explain(model, IDS, rotation="random", stop_after="place-rotations").plan
    online = {transform.rotation for transform in plan.online}
    absorbed = {t.rotation for t in plan.transforms if not t.online and t.rotation not in online}
    assert all(name.startswith("hadamard-") for name in online)
    assert any(name.startswith("random-") for name in absorbed)


def test_no_rotation(model):
    report = quarot_fx.explain(model, IDS, rotation="none")
    assert report.plan.transforms == ()
    assert {record.w_bits for record in report.linears} == {4, 16}


def test_another_seed_is_another_rotation_of_the_same_function(model):
    kwargs = {"w_bits": 16, "a_bits": 16, "kv_bits": 16}
    one, two = (quarot_fx.rewrite(model, IDS, seed=seed, **kwargs) for seed in (0, 1))
    changed = [a for a, b in zip(one.buffers(), two.buffers(), strict=True) if not torch.equal(a, b)]
    assert changed
    assert relative_difference([one(IDS)[0]], [two(IDS)[0]]) < 1e-5


def test_rewrite_gives_a_graph_that_runs_and_reads(model):
    gm = quarot_fx.rewrite(model, IDS)
    code = gm.print_readable(print_output=False)
    FileCheck().check("ids").check("quarot.quantize_symmetric").check("aten.linear").run(code)
    FileCheck().check("scaled_dot_product_attention").check("quarot.rotate.default").run(code)
    assert gm(IDS)[0].shape == (2, 12, 40)
    assert isinstance(gm.quarot, quarot_fx.Report)


def test_rewrite_stops_where_it_is_told(model):
    gm = quarot_fx.rewrite(model, {"ids": IDS}, stop_after="rotate")
    FileCheck().check_not("quarot.quantize").run(gm.code)
    assert relative_difference([gm(IDS)[0]], [model(IDS)]) < 1e-5


def test_an_exported_program_can_be_rewritten(model):
    exported = torch.export.export(model, (IDS,)).module()
    gm = quarot_fx.rewrite(exported, IDS, stop_after="rotate")
    assert relative_difference([gm(IDS)[0]], [model(IDS)]) < 1e-5


def test_explain_reports_everything(model):
    report = quarot_fx.explain(model, IDS)
    assert [p.name for p in report.passes][-1] == "fold-constants"
    assert all(p.difference is not None for p in report.passes)
    assert max(p.difference for p in report.passes if p.name == "rotate") < 1e-9
    linears = {record.parameter: record for record in report.linears}
    assert linears["down.weight"].rotated == "online"
    assert linears["gate.weight"].rotated == "free"
    assert (linears["head.weight"].w_bits, linears["head.weight"].a_bits) == (16, 16)
    assert "output head" in linears["head.weight"].reason
    assert {(record.kind, record.bits) for record in report.caches} == {("key", 4), ("value", 4)}
    before, after = report.weight_bytes
    assert after < before
    text = str(report)
    assert "place-rotations" in text
    assert "down" in text
    json.dumps(report.as_dict())


def test_overrides_by_name(model):
    overrides = {"down": {"w_bits": 8, "a_bits": 8}, "*gate*": "skip", "head": {"w_bits": 8, "a_bits": 16}}
    linears = {r.parameter: (r.w_bits, r.a_bits) for r in quarot_fx.explain(model, IDS, overrides=overrides).linears}
    assert linears["down.weight"] == (8, 8)
    assert linears["gate.weight"] == (16, 16)
    assert linears["head.weight"] == (8, 16)
    assert linears["up.weight"] == (4, 4)


def test_an_embedding_is_quantised_when_asked_for(model):
    expected = model(IDS)
    gm = quarot_fx.rewrite(model, IDS, overrides={"table": {"w_bits": 8}}, w_bits=16, a_bits=16, kv_bits=16)
    FileCheck().check("table_weight_codes").check("embedding").check("unpack").run(gm.code)
    assert 0 < (gm(IDS)[0] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_and_symmetry(model, bits, symmetric):
    options = {
        "w_sym": symmetric,
        "a_sym": symmetric,
        "kv_sym": symmetric,
        "w_clip": 1.0,
        "a_clip": 1.0,
        "kv_clip": 1.0,
    }
    gm = quarot_fx.rewrite(model, IDS, w_bits=bits, a_bits=bits, kv_bits=bits, **options)
    expected = model(IDS)
    error = (gm(IDS)[0] - expected).norm() / expected.norm()
    assert error < 4 / 2**bits, f"{bits} bits: {error:.3f}"


def test_groups(model):
    options = {"w_clip": 1.0, "a_clip": 1.0, "kv_clip": 1.0}
    expected = model(IDS)
    errors = [
        float((quarot_fx.rewrite(model, IDS, w_group=g, a_group=g, kv_group=g, **options)(IDS)[0] - expected).norm())
        for g in (None, 8, 2)
    ]
    assert errors[0] > errors[2], "finer groups are nearer"


def test_one_compiled_model_serves_many_shapes(model):
    function = torch.compile(
        model,
        backend="quarot",
        options={"w_bits": 16, "a_bits": 16, "kv_bits": 16, "nested_backend": "eager"},
        dynamic=True,
    )
    for length in (12, 7, 9):
        ids = IDS[:, :length]
        torch.testing.assert_close(function(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = Model().eval().to(dtype)
    gm = quarot_fx.rewrite(model, IDS, stop_after="rotate")
    expected = model(IDS)
    assert gm(IDS)[0].dtype == dtype
    assert relative_difference([gm(IDS)[0]], [expected]) < {torch.float64: 1e-9}.get(dtype, 5e-2)


def test_inference_mode_and_grad_mode(model):
    function = torch.compile(model, backend="quarot", options={"w_clip": 1.0, "nested_backend": "aot_eager"})
    with torch.enable_grad():
        first = function(IDS)
    with torch.inference_mode():
        second = function(IDS)
    torch.testing.assert_close(first, second)


def test_inductor_knows_our_ops_before_it_meets_them(model, monkeypatch):
    """It would print all that the arguments of an unknown one were computed from, in deep models forever."""
    from torch._inductor import compile_fx as inductor
    from torch._inductor import lowering

    def is_ours(target):
        return isinstance(target, torch._ops.OpOverload) and target.namespace.startswith("quarot")

    for target in filter(is_ours, list(lowering.lowerings)):
        monkeypatch.delitem(lowering.lowerings, target)

    def record(gm, *_, **__):
        seen.extend(node.target for node in gm.graph.nodes if is_ours(node.target))
        assert set(seen) <= set(lowering.lowerings)
        raise RuntimeError("this is enough")

    seen = []
    monkeypatch.setattr(inductor, "compile_fx", record)
    with pytest.raises(NestedBackendError, match="this is enough"):
        torch.compile(model, backend="quarot")(IDS)
    assert torch.ops.quarot.quantize_symmetric.default in seen


def test_constants_and_static_caches_are_static_inputs(fresh_dynamo, monkeypatch):
    """What Inductor is told has a fixed address: CUDA graphs copy all else, and refuse to write to it."""
    from torch._inductor import compile_fx as inductor
    from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    decoder = AutoModelForCausalLM.from_config(config).eval()
    cache = StaticCache(config=config, max_cache_len=16)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    static, dynamic = [], []

    def record(gm, example_inputs, **kwargs):
        static.extend(kwargs["static_input_idxs"])
        dynamic.extend(set(range(len(example_inputs))) - set(static))
        raise RuntimeError("this is enough")

    monkeypatch.setattr(inductor, "compile_fx", partial(inductor.compile_fx, inner_compile=record))
    compiled = torch.compile(decoder, backend="quarot", options={"kv_bits": 16})
    with pytest.raises(NestedBackendError, match="this is enough"):
        compiled(input_ids=torch.tensor([[1]]), past_key_values=cache)
    packed, unpacked = 7 * 2 * 2, 3  # codes and scales of each linear layer; embedding, output head, frequencies
    of_cache = 3 * 2  # keys, values and length of each layer
    assert (len(static), dynamic) == (packed + unpacked + of_cache, [0])  # and the token
