"""The kernel for many tokens on Hopper: on such a GPU, or compiled for one, and its warps as threads of Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quarot_fx.ops import DECLARATIONS
from quarot_fx.ops.int_linear import random_arguments

pytest.importorskip("triton", reason="kernels need Triton, which is there for Linux only")

from threads_for_hopper import run_in_threads

from quarot_fx.lowering.triton.device import Device
from quarot_fx.lowering.triton.gated_int_linear import gated_int_linear
from quarot_fx.lowering.triton.int_linear import int_linear
from quarot_fx.lowering.triton.int_matmul_hopper import fits

pytestmark = pytest.mark.kernels
LAUNCH = {"BLOCK_N": 256, "BLOCK_M": 128, "BLOCK_K": 64, "RASTER": 8, "STAGES": 5}
SMALL = {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_K": 64, "RASTER": 2, "STAGES": 3}
WIDE = {"BLOCK_N": 128, "BLOCK_M": 256, "BLOCK_K": 64, "RASTER": 2, "STAGES": 4}
DEEP = {"BLOCK_N": 256, "BLOCK_M": 128, "BLOCK_K": 128, "RASTER": 8, "STAGES": 2}
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


# -- compiled for sm_90 ----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    ("activation", "launch", "kind"),
    [
        (None, LAUNCH, {"dtype": "bfloat16", "bias": True, "residual": True}),
        pytest.param("silu", SMALL, {"dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param(
            None,
            DEEP,
            {"dtype": "float32", "symmetric": False, "weight_symmetric": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_register_is_written_while_a_product_reads_it(
    activation: str | None, launch: dict[str, int], kind: dict[str, Any]
) -> None:
    """The compiler does not know that ``wgmma`` reads on after it was issued: it is told."""
    program = Path(__file__).with_name("compile_for_hopper.py")
    request = json.dumps([activation, launch, kind])
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    process = subprocess.run([sys.executable, program, request], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout)
    assert found["products"] > 0
    assert not found["overwritten"]


# -- on a GPU, or in threads -----------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where the kernel runs."""
    if IS_HOPPER:
        return "cuda"
    run_in_threads(monkeypatch)
    return "cpu"


def on(device: str, args: tuple[Any, ...]) -> list[Any]:
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]


def check_agrees(name: str, actual: torch.Tensor, args: list[Any]) -> None:
    expected = DECLARATIONS[name].reference(*args)
    limit = DECLARATIONS[name].tolerance[expected.dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("launch", [LAUNCH, SMALL, WIDE, DEEP])
@pytest.mark.parametrize(("tokens", "rows", "n"), [(3, 40, 256), (300, 1040, 528), (257, 200, 4112), (1000, 272, 512)])
def test_sums_are_exact(tokens: int, rows: int, n: int, launch: dict[str, int], device: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-8, 8, (tokens, n), dtype=torch.int8, generator=generator)
    weight = torch.randint(-8, 8, (rows, n), dtype=torch.int8, generator=generator)
    codes[:2], weight[:3] = -8, -8  # the largest products
    packed, sums = DECLARATIONS["pack_weight"].reference(weight, 4), codes.sum(-1, keepdim=True, dtype=torch.int32)
    weights = (packed, torch.ones(rows, 1), None, None, 4, None, None, torch.float32)
    args = on(device, (codes, torch.ones(tokens, 1), None, sums, *weights))
    assert torch.equal(int_linear(*args, launch=launch).cpu().double(), codes.double() @ weight.double().mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weight_symmetric", [True, False])
def test_everything_that_an_epilogue_does(
    symmetric: bool, weight_symmetric: bool, dtype: torch.dtype, device: str
) -> None:
    kind = {"symmetric": symmetric, "weight_symmetric": weight_symmetric, "dtype": dtype}
    generator = torch.Generator().manual_seed(0)
    args = on(device, random_arguments(generator, 300, 1040, 528, bias=True, residual=True, **kind))
    args[5] = args[5].to(torch.bfloat16)  # the weight's scales
    check_agrees("int_linear", int_linear(*args, launch=LAUNCH), args)
    *operands, _, dtype = on(device, random_arguments(generator, 300, 1056, 528, bias=True, **kind))
    for activation in ("silu", "gelu", "relu_squared", "sigmoid"):
        gated = [*operands, dtype, activation]
        check_agrees("gated_int_linear", gated_int_linear(*gated, launch=LAUNCH), gated)


# -- what it is not for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"codes": torch.zeros(300, 520, dtype=torch.int8)}, False),  # a row is not a multiple of 16 bytes
        ({"codes": torch.zeros(300, 528).to(torch.float8_e4m3fn)}, False),
        ({"scale": torch.ones(300, 2)}, False),
        ({"weight_scale": torch.ones(1040, 4)}, False),
        ({"weight_bits": 8}, False),
        ({"y": torch.zeros(300, 1044, dtype=torch.bfloat16)}, False),
    ],
)
def test_what_fits(change: dict[str, Any], is_taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {
        "codes": torch.zeros(300, 528, dtype=torch.int8),
        "scale": torch.ones(300, 1),
        "weight_scale": torch.ones(1040, 1),
        "weight_bits": 4,
        "y": torch.zeros(300, 1040, dtype=torch.bfloat16),
    }
    for capability, can in (((9, 0), is_taken), ((8, 0), False), ((10, 0), False)):
        device = Device(capability, 232448, multiprocessors=132)
        monkeypatch.setattr("quarot_fx.lowering.triton.int_matmul_hopper.describe", lambda _, found=device: found)
        assert fits(**(args | change)) == can
