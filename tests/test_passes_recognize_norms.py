import pytest
import torch
from graphs import WIDTH, Lambda, apply, captured, check_code, linear, reasons, rewritten, targets, tokens
from torch import nn
from torch.nn import functional as F

from quarot_fx.passes.recognize_norms import RecognizeNorms

EPS = 1e-6


def unit(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


SPELLINGS = {
    "pow and mean": lambda m, x: m.g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "x * x": lambda m, x: m.g * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)),
    "square": lambda m, x: m.g * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)),
    "mean without keepdim": lambda m, x: m.g * (x * torch.rsqrt(x.square().mean(-1) + EPS)[..., None]),
    "positive axis": lambda m, x: m.g * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS)),
    "sum": lambda m, x: m.g * (x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) / WIDTH + EPS)),
    "F.rms_norm": lambda m, x: F.rms_norm(x, (WIDTH,), m.g, EPS),
    "1 + gain": lambda m, x: (1 + m.g) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "cast before gain": lambda m, x: m.g * unit(x.double()).to(x.dtype),
    "cast after gain": lambda m, x: (m.g * unit(x.double())).to(x.dtype),
    "dtype of mean": lambda m, x: m.g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + EPS)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rms_norm_in_every_spelling(spelling):
    program = captured(Lambda(SPELLINGS[spelling], g=WIDTH), tokens())
    result, report = apply(RecognizeNorms(), program, tokens())
    assert (report.matched, report.declined) == (1, [])
    check_code(result).check_count("quarot.mean_square", 1, exactly=True).run()
    assert not {"pow", "square", "mean", "sum", "rms_norm"} & set(targets(result))


def layer_norm_by_hand(m, x):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS) * m.g + m.b


def test_layer_norm_written_by_hand():
    program = captured(Lambda(layer_norm_by_hand, g=WIDTH, b=WIDTH), tokens())
    result, report = apply(RecognizeNorms(), program, tokens())
    assert (report.matched, report.declined) == (3, [])  # two subtractions of the mean, one length
    assert targets(result).count("project_out") == 2
    assert "mean" not in targets(result)


def test_fused_layer_norm_is_written_out():
    program = captured(nn.LayerNorm(WIDTH), tokens())
    result, report = apply(RecognizeNorms(), program, tokens())
    assert (report.matched, report.declined) == (1, [])
    assert targets(result) == ["project_out", "mean_square", "add", "rsqrt", "mul", "mul", "add"]


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_layer_norm_without_some_of_its_parts(options):
    module = nn.Sequential(nn.LayerNorm(WIDTH, **options), linear(4))
    _, report = apply(RecognizeNorms(), captured(module, tokens()), tokens())
    assert report.matched == 1


def test_layer_norm_whose_mean_direction_is_no_binary_fraction():
    apply(RecognizeNorms(), captured(nn.LayerNorm(12), tokens(2, 12)), tokens(2, 12))


def test_rms_norm_with_its_default_epsilon():
    program = captured(Lambda(lambda m, x: F.rms_norm(x, (WIDTH,), m.g), g=WIDTH), tokens() * 1e-4)
    result, _ = apply(RecognizeNorms(), program, tokens() * 1e-4)
    torch.testing.assert_close(result.graph_module(tokens() * 1e-4), program.graph_module(tokens() * 1e-4))


def test_half_precision_is_computed_in_float32():
    program = captured(nn.LayerNorm(WIDTH).bfloat16(), tokens().bfloat16())
    result, _ = apply(RecognizeNorms(), program, tokens().bfloat16())
    check_code(result).check("aten.to.dtype").check_same("float32").check("aten.to.dtype").check_same("bfloat16").run()
    x = tokens().bfloat16()
    torch.testing.assert_close(result.graph_module(x), program.graph_module(x))


def test_norm_over_several_axes_is_declined():
    program = captured(nn.LayerNorm((3, WIDTH)), tokens())
    result, report = apply(RecognizeNorms(), program, tokens())
    assert (report.matched, reasons(report)) == (0, ["normalises over several axes"])
    assert targets(result) == ["layer_norm"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.pow(3).mean(-1, keepdim=True),
        lambda x: x.pow(2).mean(1, keepdim=True),
        lambda x: x.pow(2).mean((1, 2), keepdim=True),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.mean(-1, keepdim=True) - x,
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2),
        lambda x: x * x.flip(0) - x.mean(-1, keepdim=True),
    ],
)
def test_what_is_no_norm_stays(function):
    program = captured(Lambda(lambda m, x: m.proj(function(x) + x), proj=linear(4)), tokens())
    result, report = apply(RecognizeNorms(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)


def test_a_second_run_finds_nothing():
    program = rewritten(captured(nn.LayerNorm(WIDTH), tokens()), RecognizeNorms())
    _, report = apply(RecognizeNorms(), program, tokens())
    assert report.matched == 0
