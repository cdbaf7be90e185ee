import pytest
import torch
from graphs import (
    WHY_NOT_FUSED,
    WIDTH,
    Lambda,
    apply,
    check_same_but_for_flips,
    exported,
    linear,
    node_named,
    operand_of,
    reasons,
    targets,
    tokens,
)
from torch.nn import functional as F

from quarot_fx.config import QuarotConfig
from quarot_fx.graph import FROZEN
from quarot_fx.passes.fuse_norms import FuseNorms
from quarot_fx.passes.recognize_norms import RecognizeNorms

EPS = 1e-3  # large, so that it matters
FUSED, REFERENCE = "quarot.norm_quantize.default", QuarotConfig(kernels="reference")


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


def unit(x):
    return x * torch.rsqrt(mean_square(x) + EPS)


def fused(module, *inputs, dtype=torch.float32):
    """Fuse, and check that the result is the same but for codes at the border of two."""
    inputs = [x.to(dtype) for x in inputs]
    program = RecognizeNorms()(exported(module.to(dtype), *inputs))
    result, report = apply(FuseNorms(REFERENCE), program, *inputs)
    check_same_but_for_flips(result.graph_module(*inputs), program.graph_module(*inputs), dtype)
    return result, report


def arguments(program, index=0):
    names = ("x", "addend", "direction", "gain", "eps", "bits", "group", "clip", "symmetric", "container")
    return dict(zip(names, node_named(program, FUSED, index).args, strict=True))


# -- spellings -------------------------------------------------------------------------------------

SPELLINGS = {
    "times rsqrt": lambda m, x: x * torch.rsqrt(mean_square(x) + EPS),
    "rsqrt times": lambda m, x: torch.rsqrt(EPS + mean_square(x)) * x,
    "over sqrt": lambda m, x: x / torch.sqrt(mean_square(x) + EPS),
    "times power": lambda m, x: x * (mean_square(x) + EPS).pow(-0.5),
    "times reciprocal": lambda m, x: x * torch.reciprocal(torch.sqrt(mean_square(x) + EPS)),
    "F.rms_norm": lambda m, x: F.rms_norm(x, (WIDTH,), eps=EPS),
    "F.layer_norm": lambda m, x: F.layer_norm(x, (WIDTH,), eps=EPS),
    "in float32": lambda m, x: unit(x.float()).to(x.dtype),
    "in float32, type_as": lambda m, x: unit(x.float()).type_as(x),
    "only its length in float32": lambda m, x: x * torch.rsqrt(mean_square(x.float()) + EPS).to(x.dtype),
    "without eps": lambda m, x: x * torch.rsqrt(mean_square(x)),
}
GAINS = {
    "before the cast": lambda m, x: (m.g * unit(x.float())).to(x.dtype),
    "after the cast": lambda m, x: m.g * unit(x.float()).to(x.dtype),
    "behind it": lambda m, x: unit(x) * m.g,
    "less 1": lambda m, x: unit(x.float()).to(x.dtype) * (1 + m.g),
    "F.rms_norm": lambda m, x: F.rms_norm(x, (WIDTH,), m.g, eps=EPS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling, dtype):
    module = Lambda(lambda m, x: operand_of(SPELLINGS[spelling](m, x)))
    result, report = fused(module, tokens(8, 5, WIDTH), dtype=dtype)
    assert (report.matched, report.declined) == (1, [])
    assert targets(result) == ["norm_quantize"]
    found = arguments(result)
    assert found["x"].op == "placeholder", "what is read is not a copy in float32"
    assert found["eps"] == (0 if spelling == "without eps" else EPS)
    assert (found["direction"] is not None) == (spelling == "F.layer_norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", GAINS)
def test_gains(spelling, dtype):
    module = Lambda(lambda m, x: operand_of(GAINS[spelling](m, x)), g=WIDTH)
    result, report = fused(module, tokens(8, 5, WIDTH), dtype=dtype)
    assert (report.matched, report.declined) == (1, [])
    assert targets(result)[-1] == "norm_quantize"
    assert arguments(result)["gain"].meta["val"].shape == (WIDTH,)


@pytest.mark.parametrize("scheme", [(4, None, True), (4, 4, False), (8, None, False)])
def test_rows_may_be_arranged_before_they_are_quantised(scheme):
    def forward(m, x):
        rows = unit(x).reshape(-1, WIDTH).unsqueeze(0)
        return operand_of(rows.transpose(0, 1).reshape(3, 2, 1, WIDTH).permute(1, 2, 0, 3), *scheme)

    module = Lambda(forward)
    result, report = fused(module, tokens())
    assert report.matched == 1
    assert not {"mul", "rsqrt", "quantize_activation"} & set(targets(result))
    assert targets(result).index("norm_quantize") < targets(result).index("reshape")


NO_NORMS = {
    "the length of another": lambda m, x: x * torch.rsqrt(mean_square(x + 1) + EPS),
    "the root is not inverted": lambda m, x: x * torch.sqrt(mean_square(x) + EPS),
    "another power": lambda m, x: x * (mean_square(x) + EPS).pow(-1),
    "another statistic": lambda m, x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS),
    "a vector of the input": lambda m, x: unit(x) * x[0, 0],
    "a bias behind it": lambda m, x: unit(x) + m.g,
    "an activation behind it": lambda m, x: unit(x).relu(),
    "its columns": lambda m, x: unit(x).mT,
}


@pytest.mark.parametrize("case", NO_NORMS)
def test_what_is_no_norm(case):
    module = Lambda(lambda m, x: operand_of(NO_NORMS[case](m, x)), g=WIDTH)
    result, report = fused(module, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert "norm_quantize" not in targets(result)


def test_an_eps_that_is_a_tensor():
    module = Lambda(lambda m, x: operand_of(x * torch.rsqrt(mean_square(x) + m.eps)), eps=())
    _, report = fused(module, tokens())
    assert reasons(report) == ["the norm's eps is not a number"]


# -- other readers ---------------------------------------------------------------------------------


def test_other_readers_keep_the_norm():
    module = Lambda(lambda m, x: (*operand_of(y := unit(x)), m.router(y)), router=linear(3))
    result, report = fused(module, tokens())
    assert report.matched == 1
    assert sorted(targets(result)) == ["add", "linear", "mean_square", "mul", "norm_quantize", "rsqrt"]


def test_of_a_norm_that_is_quantised_twice_nothing_is_left():
    module = Lambda(lambda m, x: (*operand_of(y := unit(x + m.a(x)), 4), *operand_of(y, 8), x), a=linear(WIDTH))
    result, report = fused(module, tokens())
    assert report.matched == 2
    assert targets(result) == ["linear", "norm_quantize", "norm_quantize"]
    assert arguments(result, 0)["addend"] is not None
    assert arguments(result, 1)["addend"] is None, "the sum is there by then"


# -- the addition ----------------------------------------------------------------------------------


def test_a_sum_is_computed_with_the_norm_and_given_to_its_other_readers():
    def forward(m, x, y):
        stream = y + m.a(x)
        return (stream.exp(), *operand_of(m.g * F.layer_norm(stream, (WIDTH,))), stream * 2)

    result, report = fused(Lambda(forward, a=linear(WIDTH), g=WIDTH), tokens(), tokens() + 1)
    assert report.matched == 1
    assert targets(result) == ["linear", "norm_quantize", "exp", "mul"]
    found = arguments(result)
    assert (found["x"].op, found["addend"]) == ("placeholder", node_named(result, "aten.linear.default"))
    assert all(vector.op == "get_attr" for vector in (found["direction"], found["gain"]))


def test_a_sum_that_nothing_else_reads():
    module = Lambda(lambda m, x: operand_of(unit(x + m.a(x))), a=linear(WIDTH))
    result, _ = fused(module, tokens(), dtype=torch.bfloat16)
    assert targets(result) == ["linear", "norm_quantize"]


NO_ADDENDS = {
    "computed on the way": lambda m, x: x + m.a(x).tanh(),
    "broadcast": lambda m, x: m.a(x) + x[:, :1],
    "a number": lambda m, x: m.a(x) + 1,
    "scaled": lambda m, x: torch.add(x, m.a(x), alpha=2),
    "of another type": lambda m, x: m.a(x) + x.bfloat16(),
}


@pytest.mark.parametrize("case", NO_ADDENDS)
def test_what_is_added_before(case):
    def forward(m, x):
        stream = NO_ADDENDS[case](m, x)
        return (*operand_of(unit(stream)), stream)

    result, report = fused(Lambda(forward, a=linear(WIDTH)), tokens())
    assert report.matched == 1
    assert arguments(result)["x"] is node_named(result, "aten.add.Tensor")
    assert arguments(result)["addend"] is None


def test_a_tensor_that_is_mutated_is_read_where_it_was():
    program = RecognizeNorms()(exported(Lambda(lambda m, x: operand_of(unit(x + 1))), tokens()))
    node_named(program, "aten.add.Tensor").meta[FROZEN] = "written in place"
    _, report = apply(FuseNorms(REFERENCE), program, tokens())
    assert report.matched == 0


# -- options and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    module = Lambda(lambda m, x: operand_of(unit(x + m.a(x))), a=linear(WIDTH))
    program = RecognizeNorms()(exported(module, tokens()))
    result, report = apply(FuseNorms(QuarotConfig(kernels=kernels)), program, tokens())
    assert (report.matched, reasons(report)) == (0, [reason])
    assert targets(result) == targets(program)


def test_dynamic_sizes():
    def forward(m, x):
        stream = x + m.a(x)
        return (*operand_of(unit(stream).reshape(-1, WIDTH)), stream * 2)

    program = RecognizeNorms()(exported(Lambda(forward, a=linear(WIDTH)), tokens(), dynamic=(0, 1)))
    result, _ = apply(FuseNorms(REFERENCE), program, tokens())
    assert arguments(result)["addend"] is not None
    assert "add" not in targets(result)
    for shape in ((2, 3, WIDTH), (1, 7, WIDTH)):
        x = tokens(*shape)
        check_same_but_for_flips(result.graph_module(x), program.graph_module(x))
