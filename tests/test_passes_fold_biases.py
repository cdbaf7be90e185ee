import pytest
from graphs import WIDTH, Lambda, apply, captured, check_code, linear, reasons, rewritten, targets, tokens
from torch import nn

from quarot_fx.passes.fold_biases import FoldBiases
from quarot_fx.passes.recognize_norms import RecognizeNorms


@pytest.mark.parametrize("bias", [True, False])
def test_bias_of_a_norm_moves_into_linears(bias):
    module = Lambda(
        lambda m, x: (m.a(y := m.norm(x)), m.b(y)),
        norm=nn.LayerNorm(WIDTH), a=linear(4, bias=bias), b=linear(6, bias=True),
    )  # fmt: skip
    program = rewritten(captured(module, tokens()), RecognizeNorms())
    result, report = apply(FoldBiases(), program, tokens())
    assert (report.matched, report.weights, report.declined) == (1, 2, [])
    check_code(result).check("rsqrt").check("mul").check("mul").check_not("add.Tensor").check("return").run()


def test_bias_reaches_linears_through_casts_and_views():
    module = Lambda(lambda m, x: m.a((x + m.b).double().view(-1, WIDTH).float()), b=WIDTH, a=linear(4))
    result, report = apply(FoldBiases(), captured(module, tokens()), tokens())
    assert report.matched == 1
    assert "add" not in targets(result)


def test_bias_written_first():
    _, report = apply(
        FoldBiases(), captured(Lambda(lambda m, x: m.a(m.b + x), b=WIDTH, a=linear(4)), tokens()), tokens()
    )
    assert report.matched == 1


def test_bias_moves_into_addmm():
    module = Lambda(lambda m, x: m.c.addmm((x + m.b).view(-1, WIDTH), m.w), b=WIDTH, c=6, w=(WIDTH, 6))
    result, report = apply(FoldBiases(), captured(module, tokens()), tokens())
    assert (report.matched, report.weights) == (1, 1)
    assert targets(result)[-1] == "addmm"
    assert "add" not in targets(result)


def test_biases_in_a_row_fold_together():
    module = Lambda(lambda m, x: m.a((x + m.b) + m.c), b=WIDTH, c=WIDTH, a=linear(4))
    result, report = apply(FoldBiases(), captured(module, tokens()), tokens())
    assert (report.matched, report.declined) == (2, [])
    _, again = apply(FoldBiases(), result, tokens())
    assert (again.matched, again.declined) == (0, [])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.a(y := x + m.b) + y.sum(), "a bias stays: it is read by aten.sum.default sum_1, not by linear"),
        (lambda m, x: (m.a(y := x + m.b), y), "a bias stays: it is read by the graph's output, not by linear layers"),
        (lambda m, x: m.a.weight.sum() + x + m.b, "a bias stays: it is read by the graph's output"),
        (lambda m, x: (x + m.b) @ m.w, "a bias stays: aten.matmul.default cannot add one"),
        (lambda m, x: (x + m.b).transpose(1, 2) @ m.v, "a bias stays: it is read by aten.transpose.int"),
    ],
)
def test_bias_stays(forward, reason):
    program = captured(Lambda(forward, b=WIDTH, w=(WIDTH, 4), v=(3, 4), a=linear(4)), tokens())
    result, report = apply(FoldBiases(), program, tokens())
    assert report.matched == 0
    (found,) = reasons(report)
    assert found.startswith(reason)
    assert targets(result) == targets(program)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x.add(m.b, alpha=2)),  # not a plain sum
        lambda m, x: m.a(x + m.scalar),
        lambda m, x: m.a(x + m.table),  # a vector for each position
        lambda m, x: m.a(x + x.flip(0)),
    ],
)
def test_what_is_no_bias_is_not_looked_at(forward):
    module = Lambda(forward, b=WIDTH, scalar=(1,), table=(3, WIDTH), a=linear(4))
    program = captured(module, tokens())
    result, report = apply(FoldBiases(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)
