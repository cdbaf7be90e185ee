"""Humming: CUDA kernels compiled when they are needed, integer weights with a scale a row next to any activations."""

from __future__ import annotations

from functools import partial

from humming.layer import HummingLayer
from torch import Tensor

from quarot_fx.bench.peers import Formats, Linear


def _prepare(weight: Tensor, activations: str) -> Linear:
    rows, columns = weight.shape
    numbers = {"weight_config": {"dtype": "int4"}, "input_config": {"dtype": activations}}
    layer = HummingLayer(shape_n=rows, shape_k=columns, **numbers, torch_dtype=weight.dtype).to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    return layer


FORMATS: Formats = {
    "W4A8": (4, partial(_prepare, activations="int8")),
    "W4A8 (float8)": (4, partial(_prepare, activations="float8e4m3")),
    "W4A4": (4, partial(_prepare, activations="int4")),
}
