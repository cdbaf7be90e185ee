"""What ``quarot-fx bench`` does besides timing, which needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import commands
import pytest
import torch

from quarot_fx.bench import peers
from quarot_fx.bench.models import OPTIONS, Workload, compilers, measure_layers, measure_model, one_layer, random_cache
from quarot_fx.bench.record import (
    AttentionTime,
    FusedTime,
    GatedTime,
    HadamardTime,
    MatmulTime,
    ModelTime,
    PeerTime,
    Record,
)
from quarot_fx.bench.shapes import MODELS, DecoderShape, distinct_shapes
from quarot_fx.bench.tables import speedups
from quarot_fx.errors import NotFoundError, OptionError, UnknownOptionError

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "kernels-h100.json"
TINY = DecoderShape(64, 176, 2, heads=4, key_value_heads=2, vocabulary=256)
PRODUCTS = [MatmulTime(32, 64, tokens, 4.0, 0.5, 1.5, 2.0) for tokens in (1, 16)]
DECODERS = [
    ModelTime("A", 2, "bfloat16", "prefill", 16, 6.0, 1.0, 1, 0, 2**30, 2**31, 2**31),
    ModelTime("A", 2, "quarot", "prefill", 16, 4.0, 1.0, 1, 0, 2**30, 2**31, 2**31),
    ModelTime("A", 2, "quarot", "decode", 16, reason="OutOfMemoryError: too large [/for] this"),
]
EXAMPLE = Record(
    {"command": "quarot-fx bench", "device": "a GPU"},
    matmul=PRODUCTS,
    peers=[PeerTime("fast W4A8", 32, 64, 1, 1.0, 4.0), PeerTime("absent", 32, 64, 1, reason="not installed")],
    fused=[FusedTime("quantise", 16, 64, 1.0, 2.0, 0.5)],
    attention=[AttentionTime(2, 64, 32, 2.0, 1.0, 7.0, "a kernel"), AttentionTime(2, 64, None, 2.0, 1.0)],
    hadamard=[HadamardTime(32, 64, 16, 8.0, 1.0, 1.5, 2.0, 2.5)],
    gated=[GatedTime(64, 32, 16, 4.0, 2.0, 6.5, 3.5, 1.5, 5.2)],
    layers=[],
    models=DECODERS,
)


run = partial(commands.run, "bench")


# -- shapes ------------------------------------------------------------------------------------------


def test_linear_layers_have_the_shapes_that_transformers_gives_them():
    from transformers import AutoModelForCausalLM

    for shape in MODELS.values():
        with torch.device("meta"):
            layer = AutoModelForCausalLM.from_config(shape.config(1, positions=16)).model.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        together = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "o": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }
        rows = {name: (sum(m.out_features for m in ms), ms[0].in_features) for name, ms in together.items()}
        assert rows == shape.linears()


def test_a_shape_is_measured_once_for_all_layers_that_have_it():
    assert "o" in distinct_shapes()[4096, 4096]
    assert distinct_shapes()[4096, 4096].count("Llama") == 2


# -- records -----------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path):
    EXAMPLE.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == EXAMPLE
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["matmul"][0]["speedup"] == 2
    assert written["hadamard"][0]["cost"] == 0.25
    assert [row["speedup"] for row in written["attention"]] == [3.5, None]
    assert "layers" not in written


def test_other_files_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="that --json wrote"):
        Record.read(tmp_path / "absent.json")
    for text in ("no json", "[]", '{"matmul": [{"rows": 1}]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(OptionError, match="not a file that --json wrote"):
            Record.read(tmp_path / "other.json")


def test_a_speedup_is_over_the_baseline_of_the_same_phase():
    work = ("A", "prefill", 1, 16)
    assert speedups(DECODERS) == {(*work, "bfloat16"): 1, (*work, "quarot"): 1.5}


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("parts", [(), ("fused",), ("models", "layers"), ("--tune", "table.json")])
def test_measuring_without_a_gpu_is_one_line(parts):
    assert run(*parts, exit_code=1).startswith("error: this measures an NVIDIA GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("matmuls",), "unknown part 'matmuls'. Did you mean 'matmul'?"),
        (("matmul", "--peers", "gemlight"), "unknown peer 'gemlight'. Did you mean 'gemlite'?"),
        (("models", "--models", "Llama-3-8"), "unknown model 'Llama-3-8'. Did you mean 'Llama-3-8B'?"),
        (("layers", "--phases", "decoding"), "unknown phase 'decoding'. Did you mean 'decode'?"),
        (("models", "--option", "kv_bit=4"), "unknown option 'kv_bit'. Did you mean 'kv_bits'?"),
        (("matmul", "--tokens", "16,many"), "option tokens='many': is not a number"),
        (("matmul", "--shapes", "4096"), "'4096': is not ROWSxCOLUMNS"),
        (("--from", "absent.json"), "found no file 'absent.json'"),
        (("models", "--from", MEASURED), "measures nothing: name no parts"),
        (("--tune", "sm_90.json", "--json", "a.json"), "option tune='sm_90.json': measures nothing"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    output = run(*arguments, exit_code=1)
    assert message in output
    assert "Traceback" not in output


def test_a_record_is_shown_without_a_gpu(tmp_path):
    EXAMPLE.write(tmp_path / "record.json")
    output = run("--from", tmp_path / "record.json")
    assert "absent: not installed" in output
    assert "A decode, quarot: OutOfMemoryError: too large [/for] this" in output
    for cell in ("4.00x", "3.50x", "none takes this", "+25.0%", "1.25x", "1.50x", "1.00 GiB"):
        assert cell in output


def test_showing_a_record_needs_no_triton(tmp_path):
    EXAMPLE.write(tmp_path / "record.json")
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from quarot_fx.cli import app; app(['bench', '--from', sys.argv[1]], standalone_mode=False)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "record.json")]
    assert "speed-up" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- plots -------------------------------------------------------------------------------------------


def test_published_numbers_are_drawn_a_panel_a_shape(tmp_path):
    pytest.importorskip("matplotlib")
    run("--from", MEASURED, "--plot", tmp_path / "kernels.svg")
    panels = [g for g in ElementTree.parse(tmp_path / "kernels.svg").iter() if g.get("id", "").startswith("axes_")]
    assert len(panels) == len(distinct_shapes())


def test_products_peers_and_models_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    EXAMPLE.write(tmp_path / "record.json")
    run("--from", tmp_path / "record.json", "--plot", tmp_path / "all.svg")
    text = (tmp_path / "all.svg").read_text()
    assert all(label in text for label in ("32 x 64", "fast W4A8", "quarot W4A4", "model: prefill"))
    assert "decode" not in text  # which failed


@pytest.mark.parametrize(
    ("record", "file", "reason"), [(EXAMPLE, "a.tabular", "tabular"), (Record({}), "a.svg", "noth")]
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, record, file, reason):
    pytest.importorskip("matplotlib")
    record.write(tmp_path / "record.json")
    output = run("--from", tmp_path / "record.json", "--plot", tmp_path / file, exit_code=1)
    assert reason in output.replace("\n", "")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'quarot-fx[bench]'" in run("--from", MEASURED, "--plot", tmp_path / "a.svg", exit_code=1)


# -- peers -------------------------------------------------------------------------------------------


def test_a_missing_peer_is_named_in_every_row(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(peers, "version", missing)
    times = list(peers.measure_peers(list(peers.PACKAGES), PRODUCTS))
    assert {time.reason for time in times} == {peers.NOT_INSTALLED}
    assert [(time.peer, time.tokens) for time in times] == [(name, m) for name in peers.PACKAGES for m in (1, 16)]


def test_a_peer_that_fails_gives_rows_with_the_reason_and_keeps_no_settings(monkeypatch):
    def prepare(weight):
        torch._inductor.config.max_autotune = True
        raise ValueError("no such kernel")

    monkeypatch.setattr(peers, "_weight", lambda rows, columns: torch.zeros(rows, columns))
    monkeypatch.setattr(peers, "version", lambda package: "1")
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: SimpleNamespace(FORMATS={"W4A8": (4, prepare)}))
    before = torch._inductor.config.max_autotune
    times = list(peers.measure_peers(["gemlite"], PRODUCTS))
    assert [(time.peer, time.reason) for time in times] == [("gemlite W4A8", "ValueError: no such kernel")] * 2
    assert torch._inductor.config.max_autotune == before


def test_a_peer_is_timed_against_bfloat16(monkeypatch):
    monkeypatch.setattr(peers, "_weight", lambda rows, columns: torch.zeros(rows, columns))
    monkeypatch.setattr(peers, "_input", lambda tokens, columns: torch.zeros(tokens, columns))
    monkeypatch.setattr(peers, "microseconds", lambda call, linears: 2.0 * call(linears[0]).shape[0])
    monkeypatch.setattr(peers, "number_of_copies", lambda nbytes: 2)
    formats = {"W8A8": (8, lambda weight: partial(torch.nn.functional.linear, weight=weight))}
    monkeypatch.setattr(peers, "_formats", lambda name: formats)
    times = list(peers.measure_peers(["fp8_rowwise"], PRODUCTS))
    assert [(time.microseconds, time.speedup) for time in times] == [(2, 2), (32, 0.125)]


def test_an_unknown_peer_suggests_the_nearest():
    with pytest.raises(UnknownOptionError, match="Did you mean 'torchao'"):
        peers.check_peers(["torchoa"])


# -- the transform's cost ----------------------------------------------------------------------------


def test_without_a_transform_the_kernel_still_computes_silu_gate_and_codes():
    from quarot_fx.bench.hadamard import identity, whole_row
    from quarot_fx.bench.matmul import SCHEME
    from quarot_fx.ops import DECLARATIONS

    columns = 112
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 5, columns, generator=generator)
    quantize = DECLARATIONS["quantize_activation"].reference
    expected = quantize(torch.nn.functional.silu(gate) * x, *SCHEME)
    op = DECLARATIONS["rotate_quantize"]
    arguments = (x, gate, "silu", *identity(columns), *SCHEME)
    torch.testing.assert_close(op.reference(*arguments), expected)
    assert not torch.equal(op.reference(x, gate, "silu", *whole_row(columns), *SCHEME)[0], expected[0])

    pytest.importorskip("triton")
    from quarot_fx.lowering.triton.rotate_quantize import rotate_quantize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes, scale, *_ = rotate_quantize(x.to(device), gate.to(device), *arguments[2:])
    torch.testing.assert_close(scale.cpu(), expected[1])
    assert (codes.cpu() != expected[0]).float().mean() < 0.01


# -- models ------------------------------------------------------------------------------------------


def workload(**changes):
    return Workload(**{"tokens": 16, "device": "cpu", "clock": lambda step: step() or 1.0, **changes})


@pytest.fixture(scope="module")
def compile_by():
    named = compilers({"nested_backend": "eager"})
    return {"bfloat16": partial(torch.compile, backend="eager", dynamic=False), "quarot": named["quarot"]}


@pytest.mark.parametrize("backend", [pytest.param("bfloat16", marks=pytest.mark.slow), "quarot"])
def test_a_model_is_one_graph_in_each_phase(compile_by, backend):
    times = list(measure_model("tiny", TINY, 2, backend, compile_by[backend], workload()))
    assert [time.phase for time in times] == ["prefill", "decode"]
    for time in times:
        assert time.reason is None
        assert (time.milliseconds, time.graphs, time.layers) == (1.0, 1, 2)
        assert time.compile_seconds > 0
        assert time.weight_bytes is None  # nothing counts them here


def test_the_cache_is_filled_and_has_room_for_every_step():
    config = TINY.config(2, positions=256)
    steps = workload(tokens=100)
    cache, nbytes = random_cache(config, steps)
    assert nbytes == 2 * sum(layer.keys.nbytes for layer in cache.layers)
    assert {layer.keys.shape for layer in cache.layers} == {(1, 2, 256, 16)}
    assert {int(layer.cumulative_length) for layer in cache.layers} == {100}
    assert all(layer.values.std() > 0.5 for layer in cache.layers)


def test_a_packed_cache_is_filled_likewise():
    cache, nbytes = random_cache(TINY.config(2, positions=256), workload(tokens=100, sequences=3, cache_bits=4))
    # Codes of 16 elements in 8 bytes, with a scale and a zero point: 13 of 32 bytes.
    assert nbytes == 2 * 2 * 3 * 2 * 256 * 13
    assert {layer.get_seq_length().item() for layer in cache.layers} == {100}
    (codes, scale, zero) = cache.layers[0].packed_keys.parts
    assert (codes.shape, len(codes.unique()), len(zero.unique())) == ((3, 2, 256, 8), 256, 4)
    assert scale.min() > 0.2


def test_decode_reads_a_packed_cache_in_one_graph(compile_by):
    steps = workload(phases=("decode",), sequences=2, cache_bits=4)
    (time,) = measure_model("tiny", TINY, 1, "quarot", compile_by["quarot"], steps)
    assert (time.reason, time.graphs, time.way) == (None, 1, "quarot, 4-bit cache")


def test_what_fails_is_a_row_with_the_reason():
    def fails(model):
        raise torch.OutOfMemoryError("too large")

    times = list(measure_model("tiny", TINY, 1, "quarot", fails, workload()))
    assert [(time.phase, time.reason) for time in times] == [
        (phase, "OutOfMemoryError: too large") for phase in ("prefill", "decode")
    ]


def test_a_layer_is_the_difference_of_two_models(compile_by):
    ticks = iter((5.0, 11.0))
    steps = workload(phases=("prefill",), clock=lambda step: next(ticks))
    (time,) = measure_layers({"tiny": TINY}, {"bfloat16": compile_by["bfloat16"]}, steps)
    assert (time.layers, time.milliseconds) == (1, 3.0)


def test_a_layer_of_which_a_model_failed_has_its_reason():
    few, more = DECODERS[0], ModelTime("A", 4, "bfloat16", "prefill", 16, reason="OutOfMemoryError: too large")
    layer = one_layer(few, more)
    assert (layer.layers, layer.milliseconds, layer.reason) == (1, None, more.reason)
    assert one_layer(more, few).reason == more.reason


def test_the_command_line_adds_to_the_options_of_quarot():
    options = compilers({"w_bits": 8, "kv_bits": 4})["quarot"].keywords["options"]
    assert options == {**OPTIONS, "mode": "reduce-overhead", "w_bits": 8, "kv_bits": 4}
