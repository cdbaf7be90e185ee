"""How long GPTQ takes on a GPU, and with how much memory: models of well-known shapes with random weights and tokens.

A decoder layer takes what three of them take longer than one, by two. The rest is of embedding, capture and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from quarot_fx.bench.memory import Memory
from quarot_fx.bench.models import FEW_LAYERS, MORE_LAYERS, Workload, forgotten, random_model, seconds
from quarot_fx.bench.record import CalibrationTime
from quarot_fx.bench.shapes import DecoderShape
from quarot_fx.calibration.calibrate import calibrate

SAMPLES, TOKENS = 128, 2048  # as in the paper of QuaRot, section 5


def measure_calibration(
    name: str, shape: DecoderShape, samples: int, tokens: int, options: Mapping[str, Any], device: str
) -> Iterator[CalibrationTime]:
    """Measure models of a few layers, and say what follows for all layers of the shape."""
    blank = CalibrationTime(name, FEW_LAYERS, samples, tokens)
    try:
        _calibrated(replace(blank, samples=1), shape, options, device)  # libraries are loaded, kernels chosen
        few = _calibrated(blank, shape, options, device)
        yield few
        more = _calibrated(replace(blank, layers=MORE_LAYERS), shape, options, device)
        yield more
    except Exception as error:  # out of memory, most of all, and then the rest shall go on
        yield replace(blank, reason=f"{type(error).__name__}: {error}")
        return
    yield whole_model(few, more, shape.layers)


def whole_model(few: CalibrationTime, more: CalibrationTime, layers: int) -> CalibrationTime:
    """Return what all layers take, if each takes what each of those takes that ``more`` has and ``few`` has not.

    Memory is no such sum: activations of one layer wait at a time, and weights of all.
    """
    a_layer = (more.seconds - few.seconds) / (more.layers - few.layers)  # type: ignore[operator]
    in_all = more.seconds + a_layer * (layers - more.layers)  # type: ignore[operator]
    return replace(more, layers=layers, seconds=in_all, weight_bytes=None, peak_bytes=None, is_measured=False)


def _calibrated(
    blank: CalibrationTime, shape: DecoderShape, options: Mapping[str, Any], device: str
) -> CalibrationTime:
    with forgotten(), torch.no_grad():
        memory = Memory(device)
        model = random_model(shape, blank.layers, Workload(blank.tokens, device=device))
        weights = memory.held()
        tokens = torch.randint(model.config.vocab_size, (blank.samples, blank.tokens), device=device)
        memory.peak()
        taken = seconds(lambda: calibrate(model, tokens, **options), device)
        return replace(blank, seconds=taken, weight_bytes=weights, peak_bytes=memory.peak())
