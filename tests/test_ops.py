from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from graphs import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from quarot_fx import ops
from quarot_fx.errors import GroupSizeError, OptionError, RotationSizeError, UnknownOptionError
from quarot_fx.ops import DECLARATIONS, OpDeclaration
from quarot_fx.ops.activations import ACTIVATIONS
from quarot_fx.ops.int_linear import random_arguments

CASES = [
    pytest.param(declaration, index, id=f"{name}-{index}")
    for name, declaration in DECLARATIONS.items()
    for index, _ in enumerate(declaration.inputs(torch.Generator().manual_seed(0)))
]
BITS = st.integers(2, 8)
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(declaration: OpDeclaration, index: int) -> tuple[object, ...]:
    return list(declaration.inputs(torch.Generator().manual_seed(0)))[index]


@st.composite
def grouped_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int | None]:
    """Draw a tensor whose magnitudes span many binades, and a group that divides its last axis."""
    group, count = draw(st.sampled_from([1, 3, 8])), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(draw(st.integers(0, 3)), count * group, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** draw(st.integers(-60, 60)) + draw(st.sampled_from([0.0, 3.0, -3.0]))
    return x, draw(st.sampled_from([group, None]))


# -- parity, from the declarations -----------------------------------------------------------------


@pytest.mark.parametrize(("declaration", "index"), CASES)
def test_schema_fake_and_tracing_agree_with_the_reference(declaration: OpDeclaration, index: int) -> None:
    args = arguments(declaration, index)
    has_float8 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args)
    # opcheck's schema test does arithmetic on its inputs, which PyTorch does not have for float8
    checks = [check for check in OPCHECKS if not (has_float8 and check == "test_schema")]
    torch.library.opcheck(declaration.overload, args, test_utils=checks)


@pytest.mark.parametrize("declaration", DECLARATIONS.values(), ids=DECLARATIONS)
def test_op_equals_the_reference(declaration: OpDeclaration) -> None:
    for args in declaration.inputs(torch.Generator().manual_seed(0)):
        assert_equals_the_reference(declaration, declaration.overload, args)


@pytest.mark.parametrize("count", [pytest.param(1, id="first"), pytest.param(None, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("declaration", DECLARATIONS.values(), ids=DECLARATIONS)
def test_compiled_op_equals_the_reference(declaration: OpDeclaration, count: int | None) -> None:
    """Dynamo sees one call, whatever the inputs; what lies behind it is traced above, for all of them."""
    for args in islice(declaration.inputs(torch.Generator().manual_seed(0)), count):
        torch.compiler.reset()
        compiled = torch.compile(lambda *args: declaration.overload(*args), backend="aot_eager", fullgraph=True)
        assert_equals_the_reference(declaration, compiled, args)


def assert_equals_the_reference(
    declaration: OpDeclaration, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    actual, expected = (outcome(declaration, one, args) for one in (function, declaration.reference))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("declaration", [d for d in DECLARATIONS.values() if d.is_traceable], ids=lambda d: d.name)
def test_a_traceable_reference_is_functional(declaration: OpDeclaration) -> None:
    """Inductor takes it in the op's place, in graphs where nothing is written to."""
    for args in declaration.inputs(torch.Generator().manual_seed(0)):
        traced = make_fx(lambda *a: declaration.reference(*a), tracing_mode="fake")(*args)
        operators = [node.target for node in traced.graph.nodes]
        assert not any(op._schema.is_mutable for op in operators if isinstance(op, torch._ops.OpOverload))
        torch.testing.assert_close(traced(*args), declaration.reference(*args), rtol=0, atol=0, equal_nan=True)


# -- meaning ---------------------------------------------------------------------------------------


def test_mean_square_is_the_same_in_every_basis() -> None:
    x = torch.randn(5, 36, dtype=torch.float64)
    rotated = ops.rotate(x, "random-hadamard-36-seed1")
    torch.testing.assert_close(ops.mean_square(rotated), x.pow(2).mean(-1, keepdim=True))


def test_project_out_subtracts_the_mean_in_every_basis() -> None:
    x, ones = torch.randn(5, 36, dtype=torch.float64), torch.full((36,), 1 / 6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(ops.project_out(x, ones), centred)
    rotation = "random-hadamard-36-seed1"
    rotated = ops.project_out(ops.rotate(x, rotation), ops.rotate(ones, rotation))
    torch.testing.assert_close(ops.rotate(rotated, rotation, inverse=True), centred)


@settings(deadline=None)
@given(grouped_tensors(), BITS)
def test_symmetric_error_is_at_most_half_a_step(case: tuple[torch.Tensor, int | None], bits: int) -> None:
    x, group = case
    codes, scale = ops.quantize_symmetric(x, bits, group)
    assert codes.dtype == torch.int8
    assert ((codes.int() >= -(2 ** (bits - 1))) & (codes.int() < 2 ** (bits - 1))).all()
    step = scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
    error = (ops.dequantize(codes, scale, None, x.dtype) - x).abs()
    assert (error <= step / 2 * (1 + 1e-9)).all()


@settings(deadline=None)
@given(grouped_tensors(), BITS)
def test_asymmetric_error_is_at_most_half_a_step(case: tuple[torch.Tensor, int | None], bits: int) -> None:
    x, group = case
    codes, scale, zero = ops.quantize_asymmetric(x, bits, group)
    assert codes.dtype == zero.dtype == torch.uint8
    assert (codes.int() < 2**bits).all()
    assert (zero.int() < 2**bits).all()
    step = scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
    error = (ops.dequantize(codes, scale, zero, x.dtype) - x).abs()
    assert (error <= step / 2 * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_clip_sets_the_scale_and_saturates(bits: int) -> None:
    x = torch.tensor([[-1.0, 0.25, 1.0]])
    codes, scale = ops.quantize_symmetric(x, bits, None, 0.5)
    torch.testing.assert_close(scale, torch.tensor([[0.5 / (2 ** (bits - 1) - 1)]]))
    assert codes[0, 2] == 2 ** (bits - 1) - 1
    assert codes[0, 0] == -(2 ** (bits - 1))
    codes, scale, zero = ops.quantize_asymmetric(x * 3 + 0.7, bits, None, 0.5)  # -2.3 to 3.7
    torch.testing.assert_close(scale, torch.tensor([[3 / (2**bits - 1)]]))
    assert codes[0, 0] == 0
    assert codes[0, 2] == 2**bits - 1
    assert zero.item() == round(1.15 / 3 * (2**bits - 1))


def test_zero_groups_have_scale_one_and_code_zero() -> None:
    x = torch.zeros(2, 8)
    codes, scale = ops.quantize_symmetric(x, 4, 4)
    assert torch.equal(codes, torch.zeros_like(codes))
    assert torch.equal(scale, torch.ones(2, 2))
    codes, scale, zero = ops.quantize_asymmetric(x, 4, 4)
    assert torch.equal(codes, torch.zeros_like(codes))
    assert torch.equal(zero, torch.zeros_like(zero))
    assert torch.equal(scale, torch.ones(2, 2))


def test_zero_stays_exactly_zero() -> None:
    x = torch.tensor([[0.0, 5.0, 6.0, 7.3], [0.0, -5.0, -6.0, -7.3], [0.0, -1.0, 2.0, 3.3]])
    codes, scale, zero = ops.quantize_asymmetric(x, 4)
    assert torch.equal(ops.dequantize(codes, scale, zero, torch.float32)[:, 0], torch.zeros(3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_group_only(value: float) -> None:
    x = torch.ones(1, 8)
    x[0, 2] = value
    codes, scale = ops.quantize_symmetric(x, 4, 4)
    symmetric = ops.dequantize(codes, scale, None, torch.float32)
    asymmetric = ops.dequantize(*ops.quantize_asymmetric(x, 4, 4), torch.float32)
    for decoded in (symmetric, asymmetric):
        assert not decoded[0, :4].isfinite().any()
        torch.testing.assert_close(decoded[0, 4:], torch.ones(4))


@pytest.mark.parametrize(("dtype", "scale_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_scales_are_float32_at_least(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    x = torch.ones(2, 8, dtype=dtype)
    assert ops.quantize_symmetric(x, 4)[1].dtype == scale_dtype
    assert ops.quantize_asymmetric(x, 4)[1].dtype == scale_dtype


@settings(deadline=None)
@given(BITS, st.integers(1, 40), st.integers(0, 3), st.booleans(), st.integers(0, 2**16))
def test_pack_round_trips(bits: int, size: int, rows: int, signed: bool, seed: int) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = torch.int8 if signed else torch.uint8
    codes = torch.randint(low, high, (rows, size), dtype=dtype, generator=torch.Generator().manual_seed(seed))
    packed = ops.pack(codes, bits)
    assert packed.shape == (rows, -(-size * bits // 8))
    assert torch.equal(ops.unpack(packed, bits, size, signed), codes)


@settings(deadline=None)
@given(BITS, st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_packed_codes_are_a_little_endian_stream_of_bits(bits: int, values: list[int]) -> None:
    values = [value % 2**bits for value in values]
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    packed = ops.pack(torch.tensor(values, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == stream.to_bytes(-(-len(values) * bits // 8), "little")


def test_signed_codes_are_packed_in_twos_complement() -> None:
    assert ops.pack(torch.tensor([-1, -8, 7, 0], dtype=torch.int8), 4).tolist() == [0x8F, 0x07]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_gated_product_is_that_of_two_products(activation: str) -> None:
    *operand, weight, scale, _, _, bits, bias, _, dtype = random_arguments(
        torch.Generator().manual_seed(0), 3, 48, 256, dtype=torch.bfloat16, bias=True
    )
    parts = [tensor.chunk(2) for tensor in (weight, scale, bias)]
    gate, up = (
        ops.int_linear(*operand, w, s, None, None, bits, b, None, torch.float32) for w, s, b in zip(*parts, strict=True)
    )
    w, s, b = (ops.interleave_rows(*pair) for pair in parts)
    gated = ops.gated_int_linear(*operand, w, s, None, None, bits, b, dtype, activation)
    assert torch.equal(gated, (ACTIVATIONS[activation](gate) * up).bfloat16())


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [ops.quantize_symmetric, ops.quantize_asymmetric])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_groups_and_bits_are_errors(op: torch._ops.OpOverload, device: str) -> None:
    x = torch.ones(2, 10, device=device)
    with pytest.raises(GroupSizeError, match="group=4 does not divide the 10 elements"):
        op(x, 4, 4)
    for bits in (1, 9, 16):
        with pytest.raises(OptionError, match=f"bits={bits}: must be 2 to 8"):
            op(x, bits)


def test_wrong_packed_sizes_are_errors() -> None:
    with pytest.raises(OptionError, match="size=5"):
        ops.unpack(torch.zeros(2, 2, dtype=torch.uint8), 4, 5, True)
    with pytest.raises(OptionError, match="bits=1"):
        ops.pack(torch.zeros(2, dtype=torch.int8), 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_that_cannot_alternate_are_errors(device: str) -> None:
    x = torch.ones(12, 3, device=device)
    for pair in ((x, x), (x[:8], x)):
        with pytest.raises(OptionError, match="rows="):
            ops.interleave_rows(*pair)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_gates_are_errors(device: str) -> None:
    def gated(rows: int, activation: str) -> torch.Tensor:
        *operands, _, dtype = random_arguments(torch.Generator().manual_seed(0), 3, rows, 256)
        moved = (one.to(device) if isinstance(one, torch.Tensor) else one for one in operands)
        return ops.gated_int_linear(*moved, dtype, activation)

    with pytest.raises(OptionError, match="rows=12: gates alternate with what they multiply 8 by 8"):
        gated(24, "silu")
    with pytest.raises(UnknownOptionError, match="Did you mean 'silu'"):
        gated(32, "sillu")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_rotations_are_errors(device: str) -> None:
    with pytest.raises(RotationSizeError, match="hadamard-12"):
        ops.rotate(torch.ones(2, 10, device=device), "hadamard-12")
    with pytest.raises(UnknownOptionError, match="hadamard-<order>"):
        ops.rotate(torch.ones(2, 10, device=device), "hadamard")
