import pytest
import torch

from quarot_fx.errors import GroupSizeError
from quarot_fx.ops import dequantize, quantize_asymmetric, quantize_symmetric, quantize_weight
from quarot_fx.ops.affine import encode
from quarot_fx.ops.clip_search import search_clip

SEARCHED = [(bits, group, symmetric) for bits in (2, 4, 8) for group in (None, 16) for symmetric in (True, False)]


def weight(rows: int = 40, size: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def group_errors(
    w: torch.Tensor, bits: int, group: int | None, symmetric: bool, clip: float | None = None
) -> torch.Tensor:
    """Return the sum of |error|^2.4 of every group, by definition, in float64."""
    codes, scale, zero = quantize_weight(w, bits, group, clip, symmetric)
    error = (dequantize(codes, scale, None if symmetric else zero, torch.float64) - w.double()).abs() ** 2.4
    return error.unflatten(-1, (scale.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize(("bits", "group", "symmetric"), SEARCHED)
def test_search_finds_the_best_of_all_80_ratios(bits: int, group: int | None, symmetric: bool) -> None:
    w = weight()
    errors = [group_errors(w, bits, group, symmetric, 1 - i / 100) for i in range(80)]
    least = torch.stack(errors).amin(0)
    searched = group_errors(w, bits, group, symmetric)
    torch.testing.assert_close(searched, least, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_prefers_the_largest_of_equal_ratios(symmetric: bool) -> None:
    assert torch.equal(search_clip(torch.zeros(3, 8), 4, 4, symmetric), torch.ones(3, 2))


def test_search_clips_an_outlier() -> None:
    w = torch.cat([weight(4, 4095), torch.full((4, 1), 6.0)], -1)
    assert (search_clip(w, 4, None, True) < 0.8).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_chunks_do_not_change_the_result(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(50, 64)
    whole = search_clip(w, 4, 16, symmetric)
    monkeypatch.setattr("quarot_fx.ops.clip_search.CPU_CHUNK", 16 * 7)
    assert torch.equal(search_clip(w, 4, 16, symmetric), whole)


def test_search_does_not_depend_on_the_weights_magnitude() -> None:
    w = weight()
    expected = search_clip(w, 4, None, True)
    for exponent in (-100, 100):
        assert torch.equal(search_clip(w * 2.0**exponent, 4, None, True), expected)


def test_a_fixed_clip_is_that_of_the_ops_and_codes_are_found_with_the_scale_that_is_stored() -> None:
    w = weight()
    codes, scale, zero = quantize_weight(w, 8, 16, 0.9, True)
    assert zero.numel() == 0
    assert torch.equal(scale, quantize_symmetric(w, 8, 16, 0.9)[1].bfloat16())
    assert torch.equal(codes, encode(w, scale, None, 8))
    assert not torch.equal(codes, quantize_symmetric(w, 8, 16, 0.9)[0])
    codes, scale, zero = quantize_weight(w, 8, None, 0.9, False)
    assert torch.equal(scale, quantize_asymmetric(w, 8, None, 0.9)[1].bfloat16())
    assert torch.equal(codes, encode(w, scale, zero, 8))


@pytest.mark.parametrize("exponent", [-120, -30, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_16_bits_cost_nothing_at_any_magnitude(exponent: int, symmetric: bool) -> None:
    w = weight() * 2.0**exponent
    codes, scale, zero = quantize_weight(w, 4, 16, 1.0, symmetric)
    stored = (dequantize(codes, scale, None if symmetric else zero, torch.float32) - w).norm()
    codes, scale, *zeros = (quantize_symmetric if symmetric else quantize_asymmetric)(w, 4, 16)
    assert stored <= 1.01 * (dequantize(codes, scale, zeros[0] if zeros else None, torch.float32) - w).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    w = torch.nn.Parameter(weight(6, 64, dtype).unflatten(0, (2, 3)))
    ratio = search_clip(w, 4, 16, False)
    codes, scale, zero = quantize_weight(w, 4, 16, None, False)
    assert codes.shape == w.shape
    assert ratio.shape == scale.shape == zero.shape == (2, 3, 4)
    assert ratio.dtype == torch.promote_types(dtype, torch.float32)
    assert scale.dtype == torch.bfloat16
    assert not ratio.requires_grad


def test_a_group_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(GroupSizeError, match="group=7 does not divide the 64 elements"):
        quantize_weight(weight(), 4, 7, None, True)
