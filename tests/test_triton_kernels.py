"""Every Triton kernel against its op's reference: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import outcome

from quarot_fx.ops import DECLARATIONS, OpDeclaration

pytest.importorskip("triton", reason="kernels need Triton, which is there for Linux only")

from quarot_fx.lowering import triton as kernels  # registers the provider
from quarot_fx.lowering.triton import append_prompt, rotate_quantize_shared, tiles
from quarot_fx.lowering.triton.appended import Appended
from quarot_fx.lowering.triton.device import Device
from quarot_fx.lowering.triton.rotation_matrices import split
from quarot_fx.lowering.triton.stacked_slabs import StackedSlabs, stacked
from quarot_fx.rotation import Rotation

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
OPS = sorted(kernels.REASONS)


def inputs(name: str) -> list[tuple[Any, ...]]:
    return list(DECLARATIONS[name].inputs(torch.Generator().manual_seed(0)))


CASES = [pytest.param(name, index, id=f"{name}-{index}") for name in OPS for index in range(len(inputs(name)))]


def on_device(args: tuple[Any, ...]) -> list[Any]:
    return [arg.to(DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in args]


def check_agrees(declaration: OpDeclaration, actual: torch.Tensor, expected: torch.Tensor, codes: int) -> None:
    """Compare one result; integers of an op with flips may differ by one step in a fraction of all codes."""
    actual = actual.cpu()
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected, dtype = actual.double(), expected.double(), actual.dtype
    if dtype in INTEGERS and declaration.code_flips:
        assert (actual - expected).abs().sum() <= max(1, declaration.code_flips * codes)
        return
    finite = expected[expected.isfinite()]
    limit = declaration.tolerance.get(dtype, 0.0) * (finite.abs().max().item() if len(finite) else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit, equal_nan=True)


# -- parity, from the declarations -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "index"), CASES)
def test_kernel_agrees_with_the_reference(name: str, index: int) -> None:
    declaration, args = DECLARATIONS[name], inputs(name)[index]
    provider, arguments = declaration.providers["triton"], on_device(args)
    if (reason := provider.reason_against(*arguments)) is not None:
        pytest.skip(reason)
    actual = outcome(declaration, provider.implementation, arguments)
    expected = outcome(declaration, declaration.reference, args)
    for made, wanted in zip(actual, expected, strict=True):
        check_agrees(declaration, made, wanted, codes=expected[0].numel())


@pytest.mark.parametrize("name", OPS)
def test_kernels_take_nearly_all_inputs_of_their_op(name: str) -> None:
    provider = DECLARATIONS[name].providers["triton"]
    reasons = [provider.reason_against(*on_device(args)) for args in inputs(name)]
    assert reasons.count(None) >= 0.7 * len(reasons), reasons


@pytest.mark.skipif(DEVICE == "cuda" or sys.platform != "linux", reason="with a GPU they are compiled to run")
@pytest.mark.parametrize("names", [("append", "rope_rotate"), pytest.param(OPS, marks=pytest.mark.slow, id="all")])
def test_kernels_are_translated_for_a_gpu(names: Sequence[str]) -> None:
    """Triton's interpreter does not see the types that its compiler refuses."""
    program = Path(__file__).with_name("compile_for_gpu.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    process = subprocess.run([sys.executable, program, *names], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == {name: [] for name in names}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_nan_shows_in_its_row_only(symmetric: bool, count: int) -> None:
    x = torch.ones(2, 40)
    x[0, :count] = torch.nan
    quantize = DECLARATIONS["quantize_activation"].providers["triton"].implementation
    codes, scale, *_ = quantize(x.to(DEVICE), 4, None, 1.0, symmetric, torch.int8)
    lowest = 0 if symmetric else -8
    assert scale[0].isnan()
    assert scale[1].isfinite()
    assert (codes[0] == lowest).all()
    assert (codes[1] == 7).all()


# -- rotations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype"),  # of which the first fills no block
    [(8960, torch.bfloat16), (4096, torch.float16), (14336, torch.float16), (4096, torch.float32)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_several_programs_make_of_a_row_what_one_makes(size: int, dtype: torch.dtype, symmetric: bool) -> None:
    from quarot_fx.lowering.triton.rotate_quantize import rotate_quantize

    whole = split(Rotation.parse(f"hadamard-{size}"), size, 1, dtype)
    assert whole is not None
    assert whole.has_parts
    x, gate = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 3], x[1] = torch.nan, 0
    arguments = on_device((x, gate, "silu", f"hadamard-{size}", 1, 4, None, 0.9, symmetric, torch.int8))
    one, several = (
        rotate_quantize(*arguments, launch={"ROWS": 1, "num_warps": 4, "num_stages": 1} | parts)
        for parts in ({}, {"PART": 128})
    )
    # On some processors the sums of the interpreter's float32 products depend on how many rows there are.
    how = {"rtol": 1e-6, "atol": 0} if DEVICE == "cpu" and dtype == torch.float32 else {"rtol": 0, "atol": 0}
    for alone, together in zip(one, several, strict=True):
        torch.testing.assert_close(alone, together, equal_nan=True, **how)


def rows_of_slabs(size: int, rows_more: int = 0) -> tuple[torch.Tensor, StackedSlabs]:
    """Return rows that lie in shared memory while they are rotated, one for each program and some more."""
    cut = split(Rotation.parse(f"hadamard-{size}"), size, 1, torch.bfloat16)
    assert cut is not None
    slabs = stacked(cut)
    assert slabs is not None
    rows = rotate_quantize_shared.programs_of(slabs, torch.device(DEVICE)) + rows_more
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).bfloat16(), slabs


@pytest.mark.parametrize(
    ("size", "gated", "bits", "symmetric"),
    [(8192, True, 4, True), (14336, False, 4, True), (14336, True, 3, False), (28672, True, 4, True)],
)
def test_rows_that_lie_in_shared_memory(size: int, gated: bool, bits: int, symmetric: bool) -> None:
    x, slabs = rows_of_slabs(size, rows_more=1)
    x[1, 5], x[3] = torch.nan, 0
    args = (x, x.flip(0) if gated else None, "silu", f"hadamard-{size}", 1, bits, None, 0.9, symmetric, torch.int8)
    arguments = on_device(args)
    assert rotate_quantize_shared.takes(arguments[0], arguments[1], bits, torch.int8, 0.9, slabs)
    declaration = DECLARATIONS["rotate_quantize"]
    actual = [
        result.cpu() for result in outcome(declaration, declaration.providers["triton"].implementation, arguments)
    ]
    has_nan = actual[1].isnan()[:, 0]
    assert has_nan.nonzero().flatten().tolist() == ([1, len(x) - 2] if gated else [1])
    assert (actual[0][has_nan] == (0 if symmetric else -(2 ** (bits - 1)))).all()
    assert torch.equal(actual[3], actual[0].sum(-1, keepdim=True, dtype=torch.int32))
    expected = outcome(declaration, declaration.reference, args)
    for one, other in zip(actual, expected, strict=True):
        check_agrees(
            declaration, one[~has_nan] if len(one) else one, other[~has_nan] if len(other) else other, x.numel()
        )


@pytest.mark.parametrize(
    ("size", "change", "is_taken"),
    [
        (8192, {}, True),
        (8192, {"gate": None}, False),  # faster in registers
        (14336, {"gate": None}, True),
        (14336, {"bits": 8}, False),  # results are rounded to bfloat16 first
        (14336, {"container": torch.float8_e4m3fn}, False),
        (14336, {"x": torch.zeros(3, 14336, dtype=torch.bfloat16)}, False),  # most programs would have nothing to do
    ],
)
def test_which_rows_lie_in_shared_memory(size: int, change: dict[str, Any], is_taken: bool) -> None:
    x, slabs = rows_of_slabs(size)
    args = {"x": x, "gate": x, "bits": 4, "container": torch.int8, "clip": 0.9, "slabs": slabs} | change
    assert rotate_quantize_shared.takes(*on_device(tuple(args.values()))) == is_taken


# -- attention -------------------------------------------------------------------------------------


def attention(keys: int) -> list[Any]:
    """Return queries of two heads, and the keys and values that they share."""
    generator = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(1, 2, 1, 32, generator=generator), torch.randn(2, 1, 1, keys, 32, generator=generator)
    return on_device((q, k, v))


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_keys_may_be_split_among_any_number_of_programs(programs: int) -> None:
    from quarot_fx.lowering.triton.attend import attend

    arguments = (*attention(3000), None, 0.3)
    launch = {"KEYS": 16, "PROGRAMS": programs, "num_warps": 4, "num_stages": 2}
    expected = DECLARATIONS["attend"].reference(*arguments)
    torch.testing.assert_close(attend(*arguments, launch=launch), expected, rtol=1e-5, atol=1e-5)


def packed_attention(keys: int, bits: int, dtype: torch.dtype) -> list[Any]:
    """Return queries of four heads, packed keys and packed values that they share, no mask, and the rest of the op."""
    generator = torch.Generator().manual_seed(0)
    q, rows = (
        torch.randn(1, 4, 1, 128, generator=generator).to(dtype),
        torch.randn(2, 1, 1, keys, 128, generator=generator),
    )
    quantize, pack = (DECLARATIONS[name].reference for name in ("quantize_asymmetric", "pack"))
    caches = [(pack(codes, bits), *scheme) for codes, *scheme in (quantize(x, bits, None, 1.0) for x in rows)]
    return on_device((q, *caches[0], *caches[1], None, 0.1, bits, bits, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("keys_of_a_warp", "warps", "programs"), [(16, 1, 1), (32, 2, 3), (64, 4, 1), (16, 4, 1000), (32, 1, 1000)]
)
def test_packed_keys_may_be_split_among_any_number_of_warps(
    keys_of_a_warp: int, warps: int, programs: int, dtype: torch.dtype
) -> None:
    from quarot_fx.lowering.triton.attend_packed import attend_packed

    arguments = packed_attention(300, 4, dtype)
    launch = {"KEYS": keys_of_a_warp, "PROGRAMS": programs, "num_warps": warps}
    check_agrees(
        DECLARATIONS["attend_packed"], attend_packed(*arguments, launch=launch),
        DECLARATIONS["attend_packed"].reference(*arguments).cpu(), codes=0,
    )  # fmt: skip


def test_packed_keys_and_values_that_a_mask_hides_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarot_fx.lowering.triton.split_attention.MOST_SPLITS", 2)
    arguments = packed_attention(1500, 4, torch.bfloat16)
    place = torch.arange(1500, device=DEVICE)
    is_read = (place >= 512) & (place < 1024)  # whole blocks of any size that a table names
    for scale in (arguments[2], arguments[5]):
        scale[:, :, ~is_read] = torch.nan
    seen = is_read & (place != 700)
    arguments[7] = seen.expand(1, 1, 1, 1500)
    actual = DECLARATIONS["attend_packed"].providers["triton"].implementation(*arguments)
    rows = [x[:, :, seen] for x in arguments[1:7]]
    expected = DECLARATIONS["attend_packed"].reference(arguments[0], *rows, None, *arguments[8:])
    check_agrees(DECLARATIONS["attend_packed"], actual, expected.cpu(), codes=0)


@pytest.mark.parametrize("is_boolean", [True, False])
def test_keys_and_values_that_a_mask_hides_are_not_read(is_boolean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program with one block reads it, whatever a mask leaves of it.
    monkeypatch.setattr("quarot_fx.lowering.triton.split_attention.MOST_SPLITS", 2)
    q, k, v = attention(1500)
    place = torch.arange(1500, device=DEVICE)
    is_read = (place >= 512) & (place < 1024)  # whole blocks of any size that a table names
    for cache in (k, v):
        cache[:, :, ~is_read] = torch.nan
    seen = is_read & (place != 700)
    mask = seen if is_boolean else torch.where(seen, 0.0, -torch.inf)
    actual = DECLARATIONS["attend"].providers["triton"].implementation(q, k, v, mask, 0.3)
    expected = DECLARATIONS["attend"].reference(q, k[:, :, seen], v[:, :, seen], None, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# -- appending to a cache --------------------------------------------------------------------------


def appended(x: torch.Tensor, bits: int, group: int | None, clip: float) -> list[tuple[torch.Tensor, ...]]:
    """Return codes, scales and zero points of x, as the kernel and as the reference store them."""
    declaration = DECLARATIONS["append"]
    codes, scale, zero = DECLARATIONS["quantize_asymmetric"].reference(x, bits, group, clip)
    rows = (DECLARATIONS["pack"].reference(codes, bits), scale, zero)
    args = (*map(torch.zeros_like, rows), x, torch.arange(x.shape[2]), None, None, None, None, bits, group, clip)
    kernel = outcome(declaration, declaration.providers["triton"].implementation, on_device(args))
    return [tuple(tensor.cpu() for tensor in kernel), rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_exact_where_nothing_is_rotated(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 100, 64, generator=torch.Generator().manual_seed(bits))
    x *= 2.0 ** torch.randint(-20, 20, (1, 8, 100, 1), generator=torch.Generator().manual_seed(1)) / 100
    x[0, 0] = (torch.arange(64) - 31.5) / 2  # halves of a step, at ties
    for group, clip in ((None, 1.0), (16, 0.95)):
        kernel, reference = appended(x.to(dtype), bits, group, clip)
        for actual, expected in zip(kernel, reference, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_group_only(value: float) -> None:
    x = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2, 20] = value
    for (codes, scale, zero), (expected_codes, expected_scale, expected_zero) in [appended(x, 4, 16, 0.95)]:
        assert torch.equal(codes, expected_codes)
        assert torch.equal(zero, expected_zero)
        torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "codes of 3 bits have no kernel"),
        ({"group": 48}, "groups of 48"),
        ({"x": torch.zeros(1, 2, 3, 96, dtype=torch.float64)}, "the activation is torch.float64"),
        ({"codes": torch.zeros(1, 2, 96, 9, dtype=torch.uint8).transpose(2, 3)}, "gaps in its last axis"),
    ],
)
def test_reasons_against_appending(change: dict[str, Any], reason: str) -> None:
    codes, scale = torch.zeros(1, 2, 9, 48, dtype=torch.uint8), torch.zeros(1, 2, 9, 1)
    args = {"codes": codes, "scale": scale, "zero": scale.byte(), "x": torch.zeros(1, 2, 3, 96), "position": None,
            "cos": None, "sin": None, "balance": None, "rotation": None, "bits": 4, "group": None, "clip": 1.0,
            **change}  # fmt: skip
    found = DECLARATIONS["append"].providers["triton"].reason_against(*on_device(tuple(args.values())))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(("shape", "each"), [((4, 8, 130, 64), 8), ((2, 8, 130, 128), 4), ((3, 6, 130, 64), 1)])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (4, None), (4, 32), (8, None)])
def test_prompts_of_many_heads(shape: tuple[int, int, int, int], each: int, bits: int, group: int | None) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).bfloat16()
    kernel, reference = appended(x, bits, group, 0.95)
    for actual, expected in zip(kernel, reference, strict=True):
        assert torch.equal(actual, expected)
    if DEVICE == "cpu":  # the interpreter's multiprocessors are few
        new = Appended(*on_device((*kernel, x, torch.arange(130), None, None, None, None, bits, group, 0.95)))
        assert append_prompt.takes(new)
        assert append_prompt.heads_of_programs([new]) == [each]


@pytest.mark.parametrize("heads", [8, 6])
def test_prompts_of_many_heads_are_embedded_and_rotated(heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    x = torch.randn(2, 150, heads, 64, generator=generator).bfloat16().transpose(1, 2)
    angles = torch.rand(2, 150, 64, generator=generator)
    codes, scale = torch.zeros(2, heads, 150, 32, dtype=torch.uint8), torch.zeros(2, heads, 150, 1)
    rest = (angles.cos().bfloat16(), angles.sin().bfloat16(), None, "hadamard-64", 4, None, 0.95)
    args = (codes, scale, scale.byte(), x, torch.arange(140), *rest)  # the first ten are not stored
    declaration = DECLARATIONS["append"]
    expected = outcome(declaration, declaration.reference, args)
    actual = outcome(declaration, declaration.providers["triton"].implementation, on_device(args))
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        check_agrees(declaration, one, other, codes.numel() if index == 0 else scale.numel())


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"x": torch.zeros(1, 2, 64, 128, dtype=torch.float16)}, True),
        ({"x": torch.zeros(1, 2, 64, 128)}, False),  # no two numbers in a word
        ({"x": torch.zeros(1, 2, 63, 128, dtype=torch.bfloat16)}, False),
        # Rows begin within a word; a copy from one device to another would not keep that.
        ({"codes": torch.zeros(1, 2, 99, 65, dtype=torch.uint8, device=DEVICE)[..., :64]}, False),
        ({"clip": 1e-3}, False),  # quotients would not fit 16 bits
    ],
)
def test_what_the_kernel_of_prompts_takes(change: dict[str, Any], is_taken: bool) -> None:
    codes, scale = torch.zeros(1, 2, 99, 64, dtype=torch.uint8), torch.zeros(1, 2, 99, 1)
    args = {"codes": codes, "scale": scale, "zero": scale.byte(), "x": torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16),
            "position": torch.arange(64), "cos": None, "sin": None, "balance": None, "rotation": None, "bits": 4,
            "group": None, "clip": 1.0} | change  # fmt: skip
    assert append_prompt.takes(Appended(*on_device(tuple(args.values())))) == is_taken


# -- choice of launch parameters -------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 3, 20, 130, 260])
@pytest.mark.parametrize(("container", "bits"), [(torch.int8, 4), (torch.int8, 8), (torch.float8_e4m3fn, 4)])
def test_every_path_accumulates_exactly(tokens: int, container: torch.dtype, bits: int) -> None:
    """With scales of 1 and results below 2^24, float32 shows each bit of the int32 sum."""
    generator = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-8, 8, (tokens, 300), dtype=torch.int8, generator=generator)
    weight = torch.randint(-8, 8, (70, 300), dtype=torch.int8, generator=generator)
    operand = (codes.to(container), torch.ones(tokens, 1), None, codes.sum(-1, keepdim=True, dtype=torch.int32))
    weights = (DECLARATIONS["pack_weight"].reference(weight, bits), torch.ones(70, 1), None, None, bits)
    args = on_device((*operand, *weights, None, None, torch.float32))
    provider = DECLARATIONS["int_linear"].providers["triton"]
    if (reason := provider.reason_against(*args)) is not None:
        pytest.skip(reason)
    assert torch.equal(provider.implementation(*args).cpu().double(), codes.double() @ weight.double().mT)


@pytest.mark.parametrize("launch", [None, {"WORDS": 512, "num_warps": 4}])
@pytest.mark.parametrize("rows", [48, 70])
def test_integer_sums_of_a_normalised_token_are_exact(launch: dict[str, int] | None, rows: int) -> None:
    """The token's numbers are its codes, up to a factor: none lies between two."""
    from quarot_fx.lowering.triton.norm_int_linear import norm_int_linear

    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-7, 8, (1, 1000), generator=generator)
    codes[0, 5] = 7
    norm_quantize = DECLARATIONS["norm_quantize"].reference
    _, scale, *_ = norm_quantize(codes.float(), None, None, None, 0.0, 4, None, 1.0, True, torch.int8)
    weight = torch.randint(-8, 8, (rows, 1000), dtype=torch.int8, generator=generator)
    packed = DECLARATIONS["pack_weight"].reference(weight, 4)
    args = (codes.float(), None, 0.0, 4, 1.0, packed, torch.ones(rows, 1), None, None, torch.float32, None)
    actual = norm_int_linear(*on_device(args), launch=launch)
    sums = actual.cpu().double() / scale
    assert torch.equal(sums.round(), codes.double() @ weight.double().mT)
    assert (sums - sums.round()).abs().max() < 0.01


@pytest.mark.parametrize("place", [0, 1023])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_shows(number: float, place: int) -> None:
    x, *rest = next(args for args in inputs("norm_int_linear") if args[0].shape[-1] == 1024)
    x = x.clone()
    x[..., place] = number
    result = DECLARATIONS["norm_int_linear"].providers["triton"].implementation(*on_device((x, *rest)))
    assert result.isnan().all()


@pytest.mark.parametrize("name", ["int_linear", "gated_int_linear"])
def test_split_products_are_the_same_in_every_run(name: str) -> None:
    multiply = getattr(import_module(f"quarot_fx.lowering.triton.{name}"), name)
    args = on_device(inputs(name)[8])
    launch = {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_K": 64, "RASTER": 8, "num_warps": 4, "num_stages": 2}
    whole, split = multiply(*args, launch=launch), multiply(*args, launch={**launch, "SPLIT_K": 3})
    assert torch.equal(whole, split)


@pytest.mark.parametrize(
    ("capability", "kibibytes", "is_hopper_like"),
    [((8, 0), 163, False), ((8, 6), 99, False), ((9, 0), 227, True), ((10, 0), 227, True), ((12, 0), 99, False)],
)
def test_every_gpu_has_launch_parameters_that_fit_it(
    capability: tuple[int, int], kibibytes: int, is_hopper_like: bool
) -> None:
    found = tiles.table(Device(capability, kibibytes * 1024, multiprocessors=132))
    for kernel in (
        "attend",
        "attend_packed",
        "float_linear",
        "int_gemv",
        "int_matmul",
        "int_matmul_float8",
        "norm_int_linear",
        "rotate_quantize",
    ):
        assert found[kernel]
    assert (len(found["int_matmul"]) > 10) == is_hopper_like


# -- what the kernels do not take ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "result is torch.float64"),
        ({"codes": torch.zeros(1, 2**20, dtype=torch.int8)}, "overflow int32"),
        ({"scale": torch.ones(1, 32)}, "groups of 16"),
        ({"scale": torch.ones(1, 2), "weight_scale": torch.ones(20, 4)}, "different sizes"),
        ({"weight_scale": torch.ones(20, 4), "weight_zero": torch.ones(20, 4, dtype=torch.int32)}, "need sums"),
    ],
)
def test_reasons_against_a_product(change: dict[str, Any], reason: str) -> None:
    names = ("codes", "scale", "zero", "sum", "weight", "weight_scale", "weight_zero", "weight_sum", "weight_bits",
             "bias", "residual", "dtype")  # fmt: skip
    args = dict(zip(names, inputs("int_linear")[0], strict=True)) | change
    found = DECLARATIONS["int_linear"].providers["triton"].reason_against(*on_device(tuple(args.values())))
    assert found is not None
    assert reason in found


def test_reasons_against_a_gated_product_are_those_against_the_product() -> None:
    *operands, _, activation = inputs("gated_int_linear")[0]
    found = (
        DECLARATIONS["gated_int_linear"]
        .providers["triton"]
        .reason_against(*on_device((*operands, torch.float64, activation)))
    )
    assert found == "the result is torch.float64"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(2, 4, 3, 64, dtype=torch.float64)}, "queries are torch.float64"),
        ({"k": torch.zeros(2, 2, 5, 64).bfloat16()}, "torch.float32, torch.bfloat16, torch.float32"),
        ({"q": torch.zeros(2, 4, 3, 512)}, "heads of 512 elements"),
        ({"q": torch.zeros(2, 4, 33, 64)}, "33 queries of 2 heads that share keys are more than 64"),
        ({"mask": torch.zeros(5, dtype=torch.int64)}, "the mask is torch.int64"),
    ],
)
def test_reasons_against_attention(change: dict[str, torch.Tensor], reason: str) -> None:
    k, v = torch.zeros(2, 2, 2, 5, 64)
    args = {"q": torch.zeros(2, 4, 3, 64), "k": k, "v": v, "mask": None, "scale": 1.0} | change
    found = DECLARATIONS["attend"].providers["triton"].reason_against(*on_device(tuple(args.values())))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("bits", "groups", "size", "reason"),
    [
        (3, 1, 64, "codes of 3 bits have no kernel"),
        (4, 8, 64, "groups of 8"),
        (4, 4, 96, "groups of 24"),
        (4, 1, 68, "68 codes of 4 bits are no whole words"),
        (4, 1, 512, "heads of 512 elements"),
    ],
)
def test_reasons_against_attention_to_codes(bits: int, groups: int, size: int, reason: str) -> None:
    codes, scale = torch.zeros(1, 2, 5, size * bits // 8, dtype=torch.uint8), torch.zeros(1, 2, 5, groups)
    held = (codes, scale, scale.byte())
    args = (torch.zeros(1, 4, 1, size), *held, *held, None, 1.0, bits, bits, size)
    found = DECLARATIONS["attend_packed"].providers["triton"].reason_against(*on_device(args))
    assert found is not None
    assert reason in found


def test_importing_the_provider_needs_no_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import quarot_fx.lowering.triton"
    subprocess.run([sys.executable, "-c", program], check=True)
