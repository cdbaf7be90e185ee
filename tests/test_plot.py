"""``quarot-fx plot``: which activations are drawn, the numbers beside the figures, and mistakes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from commands import run

import quarot_fx
from quarot_fx.quantization_error import LayerSQNR, SQNRReport
from quarot_fx.report import LinearRecord

QKV_AND_DOWN = [("q", 1), ("k", 1), ("v", 1), ("down", 2)]


def layer(name, channels, role=""):
    ranges = torch.tensor(channels, dtype=torch.float64)
    return LayerSQNR(LinearRecord(f"{name}.weight", 4, 4, "free", role=role), 20.0, 19.0, 17.0, ranges)


def test_of_inputs_that_are_alike_the_first_the_middle_and_the_last_are_drawn():
    pytest.importorskip("matplotlib")
    from quarot_fx.cli.figures import inputs_to_draw

    layers = [layer(f"layers.{i}.{name}", [i, channel]) for i in range(5) for name, channel in QKV_AND_DOWN]
    report = SQNRReport((*layers, layer("head", [9, 9], role="head")), ())
    inputs = inputs_to_draw(report, report)
    assert [one.name for one in inputs] == [
        *(f"layers.{i}.q + 2" for i in (0, 2, 4)),
        *(f"layers.{i}.down" for i in (0, 2, 4)),
    ]
    assert inputs[1].parameters == ("layers.2.q.weight", "layers.2.k.weight", "layers.2.v.weight")
    assert inputs[1].rotated == inputs[1].unrotated == [2.0, 1.0]


def test_figures_and_their_numbers(tiny_folder, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "plots"
    output = run("plot", tiny_folder, folder, "--tokens", 16, "--setting", "W4A6KV4", "--format", "svg")
    assert {path.name for path in folder.iterdir()} == {"ranges.svg", "sqnr.svg", "layers.json"}
    record = json.loads((folder / "layers.json").read_text())
    assert (record["tokens"], record["setting"], record["options"]["a_bits"]) == (16, "W4A6KV4", 6)
    rotated, unrotated = record["rotated"]["layers"], record["unrotated"]["layers"]
    assert {one["rotated"] for one in rotated} == {"free", "online"}
    assert {one["rotated"] for one in unrotated} == {"no"}
    assert f"{rotated[0]['output']:.1f}" in output
    down = next(one for one in record["ranges"] if "down_proj" in one["parameters"][0])
    assert len(down["with rotation"]) == len(down["without rotation"]) == 176
    for name in ("ranges.svg", "sqnr.svg"):
        assert "with rotation" in (folder / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--setting", "float"), "is drawn with and without rotation"),
        (("--setting", "W4-norot"), "is drawn with and without rotation"),
        (("--format", "bmp"), "is not one of png, svg, pdf"),
        (("--text", "absent.txt"), "found no text 'absent.txt'"),
    ],
)
def test_mistakes_are_one_line(tiny_folder, tmp_path, arguments, message):
    pytest.importorskip("matplotlib")
    output = run("plot", tiny_folder, tmp_path, *arguments, exit_code=1)
    assert message in output
    assert "Traceback" not in output


def test_matplotlib_is_asked_for_by_its_extra(monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'quarot-fx[eval]'" in run("plot", tiny_folder, tmp_path, exit_code=1)


def test_the_function_is_public():
    assert "sqnr" in quarot_fx.__all__
    assert quarot_fx.SQNRReport is SQNRReport
