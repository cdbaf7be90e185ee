import pytest
import torch
from graphs import Lambda, apply, captured, difference, linear, reasons, rewritten, targets, tokens
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.lower_ops import LowerOps
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT_LINEAR, QUANTIZE = "quarot_triton.int_linear.default", "quarot_triton.quantize_activation.default"


def fused(device="cpu"):
    config = QuarotConfig(kernels="reference")
    module = Lambda(lambda m, x: torch.ops.quarot.mean_square(m.a(x)), a=linear(12)).to(device)
    return rewritten(
        captured(module, tokens().to(device)),
        QuantizeWeights(config),
        QuantizeActivations(config),
        FuseIntLinears(config),
    )


@pytest.mark.kernels
def test_ops_are_given_to_the_provider_that_takes_them():
    pytest.importorskip("triton")
    program = fused(DEVICE)
    result, report = apply(LowerOps(), program)
    assert report.matched == 2
    assert reasons(report) == ["quarot::mean_square runs as its reference: no provider implements quarot::mean_square"]
    called = [str(node.target) for node in result.graph.nodes]
    assert (INT_LINEAR in called, QUANTIZE in called) == (True, True)
    assert "quarot.pack_weight.default" in called  # computed once, by its reference
    x = tokens().to(DEVICE)
    assert_close(result.graph_module(x), program.graph_module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
def test_in_float64_an_op_runs_as_its_reference_whoever_it_is_given_to():
    pytest.importorskip("triton")
    module, x = Lambda(lambda m, x: torch.ops.quarot.rotate(m.a(x), "hadamard-12"), a=linear(12)), tokens().to(DEVICE)
    program = captured(module.to(DEVICE), x)
    result, report = apply(LowerOps(), program, x)
    assert report.matched == 1
    assert difference(result, program, x) == 0


def test_ops_that_no_provider_takes_are_named_with_the_reason():
    program = fused()
    result, report = apply(LowerOps(), program, tokens())
    assert (report.matched, targets(result)) == (0, targets(program))
    reason = "runs as its reference: triton: Triton's kernels run on NVIDIA GPUs, not on cpu"
    assert reasons(report)[:2] == [f"quarot::quantize_activation {reason}", f"quarot::int_linear {reason}"]


def test_a_call_by_keyword_is_named():
    def forward(m, x):
        return torch.ops.quarot.rotate(m.a(x), rotation="hadamard-12")

    program = captured(Lambda(forward, a=linear(12)), tokens())
    for node in program.graph.nodes:
        if str(node.target) == "quarot.rotate.default":
            node.args, node.kwargs = node.args[:1], {"rotation": "hadamard-12"}
    _, report = apply(LowerOps(), program, tokens())
    assert reasons(report) == ["quarot::rotate runs as its reference: it is called with keyword arguments"]
