import pytest
import torch
from graphs import WIDTH, Lambda, apply, captured, linear, targets, tokens

from quarot_fx.passes.unify_linears import UnifyLinears

WEIGHTS = {"w": (WIDTH, 6), "v": (6, WIDTH), "stack": (2, WIDTH, 6), "c": 6}
SPELLINGS = {
    "x @ W": lambda m, x: x @ m.w,
    "x @ W.T": lambda m, x: x @ m.v.T,
    "x @ W.t()": lambda m, x: x @ m.v.t(),
    "x @ W.mT": lambda m, x: x @ m.v.mT,
    "x @ W.transpose": lambda m, x: x @ m.v.transpose(-1, -2),
    "x @ W.permute": lambda m, x: x @ m.v.permute(1, 0),
    "mm": lambda m, x: torch.mm(x.flatten(0, 1), m.w),
    "addmm": lambda m, x: torch.addmm(m.c, x.flatten(0, 1), m.w),
    "vector @ W": lambda m, x: x[0, 0] @ m.w,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_linear(spelling):
    result, report = apply(UnifyLinears(), captured(Lambda(SPELLINGS[spelling], **WEIGHTS), tokens()), tokens())
    assert (report.matched, report.declined) == (1, [])
    assert targets(result)[-1] == "linear"
    assert not {"matmul", "mm", "addmm"} & set(targets(result))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.v @ x.transpose(1, 2), ["linear", "transpose"]),
        (lambda m, x: torch.mm(m.v, x[0].mT), ["select", "mT", "transpose", "linear", "transpose"]),
        (lambda m, x: m.w.T @ x.sin().transpose(-1, -2).contiguous(), None),
        (lambda m, x: m.v @ x[0, 0], ["select", "select", "linear"]),
    ],
)
def test_a_weight_on_the_left(forward, expected):
    result, report = apply(UnifyLinears(), captured(Lambda(forward, **WEIGHTS), tokens()), tokens())
    assert (report.matched, report.declined) == (1, [])
    assert "linear" in targets(result)
    assert expected is None or targets(result) == expected


def test_a_transposed_weight_is_used_as_it_is_stored():
    result, _ = apply(UnifyLinears(), captured(Lambda(lambda m, x: x @ m.v.T, **WEIGHTS), tokens()), tokens())
    assert targets(result) == ["linear"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x),  # linear already
        lambda m, x: (x @ x.mT) * m.c[0],  # no weight
        lambda m, x: x @ m.stack,  # a matrix for each entry of the batch
        lambda m, x: x @ m.w[:, 0],  # a vector
        lambda m, x: torch.addmm(m.c, x[0], m.w, beta=2),
        lambda m, x: torch.addmm(m.c[:1], x[0], m.w),  # one bias for all channels
        lambda m, x: torch.addmm(x[0, :, :6], x[0], m.w),  # what is added is no bias
        lambda m, x: m.stack @ x.mT[:, :6],  # a matrix for each entry of the batch, on the left
    ],
)
def test_what_is_not_linear_stays(forward):
    program = captured(Lambda(forward, a=linear(4), **WEIGHTS), tokens())
    result, report = apply(UnifyLinears(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)
