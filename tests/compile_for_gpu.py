"""Translates the kernels of ops for a GPU that is not there, and prints which cannot be; in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton.compiler
from compile_for_hopper import HOPPER, Driver
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from quarot_fx.lowering import triton as kernels  # noqa: F401  registers the provider
from quarot_fx.lowering.triton import device, support
from quarot_fx.ops import DECLARATIONS


def translate(source: ASTSource, target: Any, options: dict[str, Any]) -> None:
    """Make Triton's own representation of a kernel, which is where mistakes of types and shapes show."""
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
    """Return what translates a kernel in the place of a launch."""
    return lambda *args, **constants: kernel.run(*args, grid=grid, warmup=True, **constants)


def untranslated(name: str) -> list[str]:
    """Return why kernels are not translated, of all inputs of an op that they take."""
    provider, found = DECLARATIONS[name].providers["triton"], []
    for index, args in enumerate(DECLARATIONS[name].inputs(torch.Generator().manual_seed(0))):
        if provider.reason_against(*args) is None:
            try:
                provider.implementation(*args)
            except triton.compiler.CompilationError as error:
                found.append(f"{index}: {_reason(error)}")
    return found


def _reason(error: BaseException) -> str:
    """Return what is wrong in the innermost function, in which the error was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


if __name__ == "__main__":
    driver.set_active(Driver())  # type: ignore[arg-type]
    device.INTERPRETER = HOPPER  # what a CPU is taken for
    support._reason_against_device = lambda *_: None  # type: ignore[assignment]
    triton.compiler.compile = translate
    KernelInterface.__getitem__ = launcher  # type: ignore[method-assign,assignment]
    print(json.dumps({name: untranslated(name) for name in sys.argv[1:]}))
