import pytest
import torch
from graphs import WIDTH, Lambda, apply, captured, check_code, linear, reasons, rewritten, rms_norm, targets, tokens
from torch import nn

from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.recognize_norms import RecognizeNorms

READERS = {
    "linear": lambda m, x: m.a(x),
    "linear with bias": lambda m, x: m.c(x),
    "addmm, a Conv1D": lambda m, x: torch.addmm(m.bias, x.view(-1, WIDTH), m.w).view(2, 3, 6),
    "matmul with a parameter": lambda m, x: x @ m.w,
    "experts": lambda m, x: torch.bmm(x, m.experts),
    "experts, repeated tokens": lambda m, x: torch.bmm(x.view(1, -1, WIDTH).expand(2, -1, -1), m.experts),
    "several": lambda m, x: m.a(x) + x @ m.w + m.c(x[:, :1]),
    "through a cast": lambda m, x: m.a(x.double().float()),
    "through a factor for each token": lambda m, x: m.a(x / torch.arange(1.0, 4.0)[:, None]),
    "through a mask of tokens": lambda m, x: m.a(x.masked_fill(torch.arange(3)[:, None] > 1, 0.0)),
}
PARTS = {"g": WIDTH, "a": linear(6), "c": linear(6, bias=True), "w": (WIDTH, 6), "experts": (2, WIDTH, 6), "bias": 6}


@pytest.mark.parametrize("reader", READERS)
def test_gain_moves_into_its_readers(reader):
    program = captured(Lambda(lambda m, x: READERS[reader](m, rms_norm(x, m.g)), **PARTS), tokens())
    program = rewritten(program, RecognizeNorms())
    result, report = apply(FoldGains(), program, tokens())
    assert (report.matched, report.declined) == (1, [])
    assert report.weights == (3 if reader == "several" else 1)
    check_code(result).check("rsqrt").check("mul.Tensor").run()
    activations = [
        node for node in result.graph.nodes if str(node.target) == "aten.mul.Tensor" and "arg" in str(node.args)
    ]
    assert all("norm_gain" not in str(node.args) and str(node.args[0]) != "g" for node in activations)


def test_one_plus_gain():
    """Gemma's norms multiply by ``1 + w``."""
    module = Lambda(lambda m, x: m.a(rms_norm(x, 1.0 + m.g)), g=WIDTH, a=linear(6))
    result, report = apply(FoldGains(), rewritten(captured(module, tokens()), RecognizeNorms()), tokens())
    assert (report.matched, report.declined) == (1, [])
    check_code(result).check("mean_square").run()


def test_tied_weight_is_scaled_for_one_reader_only():
    module = Lambda(lambda m, x: m.a(x * m.g) + m.a(x), g=WIDTH, a=linear(6))
    _, report = apply(FoldGains(), captured(module, tokens()), tokens())
    assert (report.matched, report.weights) == (1, 1)


def test_gains_in_a_row_fold_together():
    module = Lambda(lambda m, x: m.a(x * m.g * m.h), g=WIDTH, h=WIDTH, a=linear(6))
    result, report = apply(FoldGains(), captured(module, tokens()), tokens())
    assert (report.matched, report.declined) == (2, [])
    _, again = apply(FoldGains(), result, tokens())
    assert (again.matched, again.declined) == (0, [])


@pytest.mark.parametrize("bias", [True, False])
def test_layer_scale_moves_back_into_its_writer(bias):
    module = Lambda(lambda m, x: x + m.g * m.a(x), g=WIDTH, a=linear(WIDTH, bias=bias))
    result, report = apply(FoldGains(), captured(module, tokens()), tokens())
    assert (report.matched, report.weights, report.declined) == (1, 1, [])
    check_code(result).check("linear").check_not("mul").check("add").run()


def test_gain_moves_back_through_a_view_into_addmm():
    module = Lambda(lambda m, x: x + torch.addmm(m.b, x.view(-1, WIDTH), m.w).view(2, 3, WIDTH) * m.g,
                    g=WIDTH, b=WIDTH, w=(WIDTH, WIDTH))  # fmt: skip
    _, report = apply(FoldGains(), captured(module, tokens()), tokens())
    assert (report.matched, report.declined) == (1, [])


def test_sandwich_norm_keeps_its_gain():
    """A norm after a linear layer and before the residual stream: neither side can take the gain."""
    module = Lambda(lambda m, x: x + rms_norm(m.a(x), m.g), g=WIDTH, a=linear(WIDTH))
    program = rewritten(captured(module, tokens()), RecognizeNorms())
    result, report = apply(FoldGains(), program, tokens())
    assert report.matched == 0
    (reason,) = reasons(report)
    assert reason.startswith("a gain stays: it is read by aten.add.Tensor add")
    assert reason.endswith("not by linear layers only")
    assert targets(result) == targets(program)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x * m.g, "it is read by the graph's output"),
        (lambda m, x: m.a(y := x * m.g) + y.sum(), "it is read by aten.sum.default"),
        (lambda m, x: m.a(torch.relu(x * m.g)), "it is read by aten.relu.default"),
        (lambda m, x: m.a((x * m.g).masked_fill(x > 1, 0.0)), "it is read by aten.masked_fill.Scalar"),
        (lambda m, x: m.a((x * m.g).masked_fill(x[..., :1] > 1, 0.5)), "it is read by aten.masked_fill.Scalar"),
        (lambda m, x: m.a(1 / (x * m.g)), "it is read by aten.reciprocal.default"),
        (lambda m, x: (x + (y := m.square(x)) * m.g) * y.sum(), "it is read by aten.add.Tensor"),  # two read y
        (lambda m, x: (x * m.g) @ (x * m.h).mT, "it is read by aten.matmul.default"),
    ],
)
def test_gain_stays(forward, reason):
    module = Lambda(forward, g=WIDTH, h=WIDTH, a=linear(6), square=linear(WIDTH))
    _, report = apply(FoldGains(), captured(module, tokens()), tokens())
    assert report.matched == 0
    assert reasons(report)[-1].startswith(f"a gain stays: {reason}")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x * 2.0),
        lambda m, x: m.a(x * m.scalar),
        lambda m, x: m.a(x * m.table),
        lambda m, x: m.a(x * x),
        lambda m, x: m.a(x[..., :1] * m.g),  # the vector is not scaled but made
    ],
)
def test_what_is_no_gain_is_not_looked_at(forward):
    module = Lambda(forward, g=WIDTH, scalar=(1,), table=(3, WIDTH), a=linear(6))
    _, report = apply(FoldGains(), captured(module, tokens()), tokens())
    assert (report.matched, report.declined) == (0, [])


def test_gain_in_half_precision_keeps_the_type():
    module = Lambda(lambda m, x: m.a((x.float() * m.g.float()).bfloat16()), g=WIDTH, a=nn.Linear(WIDTH, 6)).bfloat16()
    result, report = apply(FoldGains(), captured(module, tokens().bfloat16()), tokens().bfloat16())
    assert report.matched == 1
    assert result.graph_module(tokens().bfloat16())[0].dtype == torch.bfloat16
