"""Mixtures of experts in every implementation that transformers has for the CPU: the same model, the same coverage."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import build, first_logits

import quarot_fx
from quarot_fx.float64 import relative_difference

pytestmark = pytest.mark.usefixtures("graphs")
MODELS = ("mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3")  # biases and weights [in, out]; shared experts; MLA
ROTATED = {"w_bits": 16, "a_bits": 16, "kv_bits": 16, "nested_backend": "eager"}


def model_with(name, implementation):
    tiny = build(name)
    tiny.model.set_experts_implementation(implementation)
    return tiny.model, tiny.inputs


def compiled_logits(model, inputs, **options):
    with torch.no_grad():
        return first_logits(torch.compile(model, backend="quarot", options=options)(**inputs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_rotation_changes_nothing(name, implementation):
    model, inputs = model_with(name, implementation)
    with torch.no_grad():
        expected = first_logits(model(**inputs))
    assert relative_difference([compiled_logits(model, inputs, **ROTATED)], [expected]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_are_quantised_and_routers_are_not(name, implementation):
    model, inputs = model_with(name, implementation)
    report = quarot_fx.explain(model, inputs, check=False)
    coverage = report.coverage
    assert coverage.quantized == coverage.linears == coverage.free + coverage.online
    experts = [linear for linear in report.linears if ".experts." in linear.parameter]
    assert len(experts) >= 2
    assert all(linear.is_quantized for linear in experts)
    routers = [linear for linear in report.linears if linear.role == "router"]
    assert routers
    assert not any(linear.is_quantized for linear in routers)
    assert {linear.rotated for linear in routers} == {"free"}


def test_weights_that_code_between_graphs_slices_stay_as_they_are():
    """The eager implementation takes an expert's matrix in Python, so no graph knows it as a parameter."""
    model, inputs = model_with("mixtral", "eager")
    with torch.no_grad():
        expected = first_logits(model(**inputs))
    logits = compiled_logits(model, inputs, nested_backend="eager")
    assert logits.isfinite().all()
    assert 1e-3 < relative_difference([logits], [expected]) < 1
