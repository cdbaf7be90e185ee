"""Every Triton kernel against its op's reference: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quarot_fx.ops import DECLARATIONS, OpDeclaration

pytest.importorskip("triton", reason="kernels need Triton, which is there for Linux only")

from quarot_fx.lowering import triton as kernels  # registers the provider

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
    actual, expected = provider.implementation(*arguments), declaration.reference(*args)
    if isinstance(expected, torch.Tensor):
        actual, expected = (actual,), (expected,)
    for made, wanted in zip(actual, expected, strict=True):
        check_agrees(declaration, made, wanted, codes=expected[0].numel())


@pytest.mark.parametrize("name", OPS)
def test_kernels_take_nearly_all_inputs_of_their_op(name: str) -> None:
    provider = DECLARATIONS[name].providers["triton"]
    reasons = [provider.reason_against(*on_device(args)) for args in inputs(name)]
    assert reasons.count(None) >= 0.7 * len(reasons), reasons
