"""Compiles ``int_matmul_hopper`` for sm_90, without a GPU, and prints what a test reads, in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from quarot_fx.lowering.triton import int_matmul_hopper as module
from quarot_fx.lowering.triton.device import Device
from quarot_fx.ops.int_linear import random_arguments

HOPPER = Device((9, 0), 232448, multiprocessors=132)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """A driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """The kernel, which compiles where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def warm_up(*args: Any, **constants: Any) -> None:
            self.binary = self.kernel.warmup(*args, grid=grid, **constants)

        return warm_up


def sass(cubin: bytes) -> list[tuple[int, str]]:
    """Return the instructions of a kernel with their addresses, without predicates."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True)
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?(.*?) ?;", text.stdout)
    return [(int(address, 16), instruction) for address, instruction in found]


def overwritten(instructions: list[tuple[int, str]]) -> list[str]:
    """Return what writes to a register that a product in flight reads, also one of the last round of a loop."""
    read: set[int] = set()
    found = []
    for address, instruction in instructions:
        found += _overwriting(instruction, read)
        if (branch := re.match(r"BRA 0x([0-9a-f]+)", instruction)) and int(branch[1], 16) < address:
            again = set(read)
            for place, repeated in instructions:
                if int(branch[1], 16) <= place < address:
                    found += _overwriting(repeated, again)
    return found


def _overwriting(instruction: str, read: set[int]) -> list[str]:
    """Return the instruction if it writes to one of these registers, which it adds to or clears."""
    if product := re.match(r"IGMMA\S* R\d+, R(\d+), gdesc", instruction):
        read |= set(range(int(product[1]), int(product[1]) + 4))
    elif instruction.startswith("WARPGROUP.DEPBAR"):
        read.clear()
    elif written := re.match(r"(?!ST|BRA|R2UR)(\S+) R(\d+)[,. ]", instruction):
        count = 4 if re.search(r"\.128|M88\.4", written[1]) else 2 if ".64" in written[1] else 1
        if read & set(range(int(written[2]), int(written[2]) + count)):
            return [instruction]
    return []


def compile_one(activation: str | None, launch: dict[str, int], **kind: Any) -> dict[str, Any]:
    """Compile one product of 300 tokens."""
    codes, scale, zero, sums, weight, w_scale, w_zero, w_sum, _, bias, residual, dtype = random_arguments(
        torch.Generator().manual_seed(0), 300, 528, 528, **kind
    )
    y = torch.empty(300, 528 if activation is None else 264, dtype=dtype)
    operands = (scale, zero, sums, w_scale, w_zero, w_sum, bias, residual)
    module.int_matmul_hopper(codes, weight, operands, y, activation, launch)
    instructions = sass(module._int_matmul_hopper.binary.asm["cubin"])
    products = sum(instruction.startswith("IGMMA") for _, instruction in instructions)
    return {"products": products, "overwritten": overwritten(instructions)}


if __name__ == "__main__":
    driver.set_active(Driver())  # type: ignore[arg-type]
    module.describe = lambda device: HOPPER
    module._int_matmul_hopper = Compiled(module._int_matmul_hopper)  # type: ignore[assignment]
    activation, launch, kind = json.loads(sys.argv[1])
    kind = {key: getattr(torch, value) if key == "dtype" else value for key, value in kind.items()}
    print(json.dumps(compile_one(activation, launch, **kind)))
