"""Soundness by fuzzing: whatever decoder is drawn, the rewritten graph computes what the program computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_grammar import Program, programs
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from quarot_fx.config import QuarotConfig
from quarot_fx.float64 import Float64Interpreter
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline

CONFIGS = st.builds(
    dict,
    rotation=st.sampled_from(["hadamard", "random"]),
    a_bits=st.sampled_from([4, 16]),
    kv_bits=st.sampled_from([4, 16]),
)


class Recorder(Float64Interpreter):
    """Keeps its inputs, to be looked at when the program has run and may have written to them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.inputs: dict[str, Tensor] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.inputs[target] = super().placeholder(target, args, kwargs)
        return self.inputs[target]


def run(module: fx.GraphModule, tensors: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    recorder = Recorder(module)
    with torch.no_grad():
        outputs = recorder.run(*tensors.values())
    return list(outputs), recorder.inputs


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not expected.is_floating_point():
        return float((actual != expected).any())
    return float((actual - expected).norm() / expected.norm().clamp_min(1))


def check(program: Program, config: QuarotConfig) -> int:
    capture = program.capture()
    bound = capture.bound()
    passes = build_pipeline(config)
    if program.dtype != torch.float64:
        passes = [one for one in passes if not isinstance(one, FoldConstants)]  # which rounds to the dtype
    rewritten = run_pipeline(bound, passes)
    names = [node.name for node in capture.graph_module.graph.find_nodes(op="placeholder")]
    expected, written = run(capture.graph_module, capture.tensors)
    written = dict(zip(capture.tensors, written.values(), strict=True))
    inputs = {node.name: capture.tensors[node.name] for node in rewritten.graph.find_nodes(op="placeholder")}
    actual, after = run(rewritten.graph_module, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert difference(a, e) < 1e-9
    for name, tensor in after.items():
        assert difference(tensor, written[name]) < 1e-9, name
    return len(rewritten.plan.transforms)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs(), CONFIGS)
def test_rewritten(program, config):
    count = check(program, QuarotConfig.from_options({**config, "stop_after": "rotate"}))
    event(f"transforms: {min(count, 3)}")
