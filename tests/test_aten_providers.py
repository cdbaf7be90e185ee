"""Providers made of PyTorch's own operators against the references of their ops, on the GPU if there is one."""

import pytest
import torch

from quarot_fx.lowering import aten  # registers the provider
from quarot_fx.lowering.providers import choose_provider
from quarot_fx.lowering.triton.device import Device
from quarot_fx.ops import DECLARATIONS

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = Device((9, 0), 232448, multiprocessors=132)
ROTATE = DECLARATIONS["rotate"]
CASES = [args for args in ROTATE.inputs(torch.Generator().manual_seed(0)) if args[0].dtype in aten.rotate.HALVES]
SIZES = (11008, 29568, 53248)  # which no program holds, or whose matrices none does


def check_agrees(args, slack=1.0):
    arguments = [arg.to(DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in args]
    actual, expected = ROTATE.providers["aten"].implementation(*arguments).cpu(), ROTATE.reference(*args)
    assert actual.dtype == expected.dtype
    limit = slack * ROTATE.tolerance[expected.dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=limit)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_the_reference(index):
    check_agrees(CASES[index])


@pytest.mark.parametrize("size", SIZES)
def test_rows_that_are_too_long_for_a_kernel(size):
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_agrees((x, f"hadamard-{size}"))


@pytest.mark.parametrize(("size", "name"), [(4096, "triton"), *((size, "aten") for size in SIZES)])
def test_it_is_chosen_on_a_gpu_where_there_is_no_kernel(size, name, monkeypatch):
    pytest.importorskip("triton")
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, size, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr("quarot_fx.lowering.triton.support._reason_against_device", lambda *_: None)
    monkeypatch.setattr("quarot_fx.lowering.triton.support.describe", lambda _: HOPPER)
    assert choose_provider(ROTATE, (x, f"hadamard-{size}")).name == name


def test_it_declines_what_the_reference_does_as_well():
    reasons = [ROTATE.providers["aten"].reason_against(x, "hadamard-4") for x in (torch.zeros(4),)]
    assert reasons == ["the reference is as fast on the CPU"]
