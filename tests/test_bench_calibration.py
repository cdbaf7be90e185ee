"""``quarot-fx bench calibration``: GPTQ of small models, and what follows for one of more layers."""

from __future__ import annotations

import pytest
from rich.console import Console

from quarot_fx.bench import calibration
from quarot_fx.bench.calibration import measure_calibration, whole_model
from quarot_fx.bench.record import CalibrationTime, Record
from quarot_fx.bench.shapes import DecoderShape
from quarot_fx.bench.tables import tables

TINY = DecoderShape(64, 176, 5, heads=4, key_value_heads=2, vocabulary=256)


def test_small_models_are_calibrated_and_the_large_one_follows(fresh_dynamo):
    few, more, whole = measure_calibration("tiny", TINY, 2, 16, {"a_bits": 8}, "cpu")
    assert (few.layers, more.layers, whole.layers) == (1, 3, 5)
    assert few.is_measured
    assert more.is_measured
    assert not whole.is_measured
    assert few.seconds > 0
    assert more.seconds > 0
    assert few.peak_bytes is None  # nothing is counted on a CPU


def test_every_layer_takes_the_same():
    few, more = CalibrationTime("A", 1, 8, 16, 10.0), CalibrationTime("A", 3, 8, 16, 14.0, 100, 200)
    assert whole_model(few, more, 32) == CalibrationTime("A", 32, 8, 16, 72.0, is_measured=False)


def test_what_fails_is_a_row_with_the_reason(monkeypatch, fresh_dynamo):
    def full(*args, **kwargs):
        raise MemoryError("it is full")

    monkeypatch.setattr(calibration, "calibrate", full)
    (row,) = measure_calibration("tiny", TINY, 2, 16, {}, "cpu")
    assert row.seconds is None
    assert row.reason == "MemoryError: it is full"


@pytest.mark.parametrize("time", [CalibrationTime("A", 32, 128, 2048, 240.4, is_measured=False)])
def test_a_record_is_read_back_and_shown(time, tmp_path):
    Record({"command": "quarot-fx bench calibration"}, calibration=[time]).write(tmp_path / "times.json")
    record = Record.read(tmp_path / "times.json")
    assert record.calibration == [time]
    console = Console(record=True, width=200)
    for table in tables(record):
        console.print(table)
    assert "about 240" in console.export_text()
