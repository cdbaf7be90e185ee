"""What ``quarot-fx eval`` makes of its measurements."""

from __future__ import annotations

import json
import sys

import pytest
from commands import run

from quarot_fx.cli.results import Results
from quarot_fx.cli.tasks import average, headline


def test_headlines_are_what_the_paper_gives():
    def task(**metrics):
        return {"metrics": {name: {"value": value, "stderr": None} for name, value in metrics.items()}}

    assert headline(task(acc=0.25, acc_norm=0.5)) == ("acc_norm", 0.5)
    assert headline(task(perplexity=7.0, acc=0.25)) == ("acc", 0.25)
    assert headline(task(perplexity=7.0)) == ("perplexity", 7.0)
    assert average([task(acc=0.25), task(acc=0.75, acc_norm=0.5)]) == 0.375
    assert average([task(acc=0.25), task(perplexity=7.0)]) is None
    assert average([]) is None


def test_the_ratio_is_to_float_wherever_that_is_measured():
    results = Results("title", {})
    results.add({"setting": "W4", "options": {}, "perplexity": 12.0})
    assert results.rows[0]["ratio"] is None
    results.add({"setting": "float", "options": None, "perplexity": 8.0})
    assert [row["ratio"] for row in results.rows] == [1.5, 1.0]


def test_a_setting_that_does_not_fit_the_model_is_named_and_the_others_are_measured(tiny_folder, tmp_path):
    file, out = tmp_path / "settings.json", tmp_path / "out.json"
    file.write_text('["float", {"name": "odd groups", "setting": "A4", "options": {"a_group": 13}}, "rotated"]')
    shape = ("--windows", 1, "--window-length", 16)
    output = run("eval", tiny_folder, *shape, "--settings-file", file, "--json", out, exit_code=1)
    rows = json.loads(out.read_text())["results"]
    assert "odd groups: a_group=13 does not divide the 64 elements" in output
    assert "a_group=13" in rows[1]["reason"]
    assert rows[2]["ratio"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["ratio"] == 1


def test_settings_come_from_one_place(tiny_folder, tmp_path):
    arguments = ("--settings", "float", "--settings-file", tmp_path / "settings.json")
    assert "comes instead of --settings" in run("eval", tiny_folder, *arguments, exit_code=1)


def test_lm_eval_is_asked_for_by_its_extra(monkeypatch, tiny_folder):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'quarot-fx[eval]'" in run("eval", tiny_folder, "--tasks", "piqa", exit_code=1)


def test_a_document_has_the_numbers_and_where_they_are_from():
    about = {"command": "quarot-fx eval x", "device": "a processor", "versions": {"torch": "2.13.0"}}
    results = Results("x: pydoc", about)
    results.add({"setting": "float", "options": None, "perplexity": 8.0, "seconds": 1.0, "first_seconds": 0.5})
    assert results.latest() == "float: perplexity 8, ratio to float 1, seconds 1.0, of it first batch 0.5"
    results.add({"setting": "W4", "options": {}, "reason": "it does not fit"})
    assert results.latest() == "W4: it does not fit"
    assert results.markdown().splitlines() == [
        "| setting | perplexity | ratio to float |",
        "| --- | --- | --- |",
        "| float | 8 | 1 |",
        "| W4 |  |  |",
        "",
        "x: pydoc. `quarot-fx eval x`, on a processor; torch 2.13.0.",
        "",
        "W4: it does not fit",
    ]
