"""What is asked of every program that is drawn, and how many are drawn: ``QUAROT_FUZZ=2000`` asks for so many."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from decoder_grammar import Program
from decoder_grammar.program import Capture, Module
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from quarot_fx.basis.plan import RotationPlan
from quarot_fx.config import QuarotConfig
from quarot_fx.float64 import Float64Interpreter
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.program import Program as Rewritten

TOLERANCE = 1e-9
LOOSE = 2e-2  # where the program itself casts to half precision and nobody widens that
EXPLORED = int(os.environ.get("QUAROT_FUZZ", 0))  # examples, other ones every time; otherwise always the same few
CONFIGS = st.fixed_dictionaries(
    {
        "rotation": st.sampled_from(["hadamard", "random"]),
        "a_bits": st.sampled_from([4, 16]),
        "kv_bits": st.sampled_from([4, 16]),
    }
)


def fuzzed(few: int, share: float = 0.0, shrinks: bool = True) -> Any:
    """Settings of a test that draws ``few`` examples in ``make test``, and its share of all in ``make fuzz``."""
    explores = bool(EXPLORED and share)
    return settings(
        max_examples=max(few, int(EXPLORED * share)) if explores else few,
        derandomize=not explores,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def check_rotated(program: Program, options: Mapping[str, Any]) -> RotationPlan:
    """Check that a program computes in rotated bases what it computes in its own, in float64; return the plan."""
    capture = program.capture()
    passes = build_pipeline(QuarotConfig.from_options({**options, "stop_after": "rotate"}))
    if program.dtype != torch.float64:
        passes = [one for one in passes if not isinstance(one, FoldConstants)]  # it rounds to the dtype
    rewritten = run_pipeline(capture.bound(), passes)
    expected, written = run_in_float64(capture.graph_module, capture.tensors.values())
    actual, rewritten_inputs = run_in_float64(rewritten.graph_module, inputs(rewritten, capture))
    assert_close(actual, expected)
    for name, place in zip(capture.tensors, written, strict=True):
        if name in rewritten_inputs:
            assert_close([rewritten_inputs[name]], [written[place]])
    check_runs(rewritten, capture)
    assert rewritten.plan is not None
    return rewritten.plan


def check_quantized(program: Program, options: Mapping[str, Any]) -> None:
    """Check that all passes with 4 bits give outputs of the shapes and dtypes that the program has."""
    capture = program.capture()
    config = QuarotConfig.from_options({**options, "w_clip": 1.0})
    check_runs(run_pipeline(capture.bound(), build_pipeline(config)), capture)


def check_compiled(program: Program, options: Mapping[str, Any]) -> None:
    """Check the backend as a whole: in float64, a compiled module gives what the module gives, and writes it too."""
    program = replace(program, dtype=torch.float64)
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        module = Module(program).eval()
        given = {name: tensor for name, tensor in program.tensors().items() if not name.startswith("weight")}
        settings = {**options, "stop_after": "rotate", "nested_backend": "eager"}
        forward = torch.compile(module, backend="quarot", options=settings) if compiled else module
        with torch.no_grad():
            outputs = [output.clone() for output in forward(given)]
        results.append([*outputs, *given.values(), *module.parameters()])
    assert_close(results[1], results[0], LOOSE)


def check_runs(rewritten: Rewritten, capture: Capture) -> None:
    """Check that a rewritten graph runs in its own dtypes, and that its outputs are finite where they were before."""
    with torch.no_grad():
        expected = capture.graph_module(*(tensor.clone() for tensor in capture.tensors.values()))
        actual = rewritten.graph_module(*(tensor.clone() for tensor in inputs(rewritten, capture)))
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.isfinite().all() or not e.isfinite().all()


def inputs(rewritten: Rewritten, capture: Capture) -> list[Tensor]:
    return [capture.tensors[node.name] for node in rewritten.graph.find_nodes(op="placeholder")]


def run_in_float64(module: fx.GraphModule, tensors: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs, and the inputs by name as they are afterwards."""
    recorder = _Recorder(module)
    with torch.no_grad():
        return list(recorder.run(*tensors)), recorder.inputs


class _Recorder(Float64Interpreter):
    """Keeps its inputs, to be looked at when the program may have written to them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.inputs: dict[str, Tensor] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.inputs[target] = super().placeholder(target, args, kwargs)
        return self.inputs[target]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if e.is_floating_point():
            assert (a - e).norm() <= tolerance * e.norm().clamp_min(1), f"off by {(a - e).norm() / e.norm():.0e}"
        else:
            assert torch.equal(a, e)
