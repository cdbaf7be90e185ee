"""Runs ``int_matmul_hopper`` on the CPU: its warps as threads of Python, which wait for each other at its barriers.

The functions of the kernel are called as they are, with what they use of Gluon in PyTorch: tensors have no layout,
and a copy is done at once, but counts as bytes at a barrier as it would.
"""

from __future__ import annotations

import threading
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from quarot_fx.lowering.triton import epilogue
from quarot_fx.lowering.triton import int_matmul_hopper as module
from quarot_fx.lowering.triton.device import Device
from quarot_fx.ops.activations import ACTIVATIONS

SECONDS = 10  # until a barrier that nothing arrives at is an error
PROGRAMS = 3
KERNEL = module._int_matmul_hopper


class Barrier:
    """An mbarrier: a phase is complete when all have arrived and all bytes that are expected are there."""

    def __init__(self) -> None:
        self.changed, self.count, self.phase, self.bytes = threading.Condition(), 0, 0, 0

    def change(self, arrivals: int = 0, nbytes: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += nbytes
            assert self.pending >= 0
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def initialise(self, count: int) -> None:
        self.count = self.pending = count

    def wait(self, phase: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != phase, SECONDS), "a deadlock"


class Shared:
    """Shared memory, or barriers in it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def index(self, place: int) -> Any:
        return self.data[place] if isinstance(self.data, list) else Shared(self.data[place])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Pointer:
    """A pointer to a tensor, or to some of its elements."""

    def __init__(self, tensor: Tensor, at: Tensor | int = 0) -> None:
        self.tensor, self.at = tensor.view(-1), at

    def __add__(self, offset: Tensor | int) -> Pointer:
        return Pointer(self.tensor, self.at + offset)

    def load(self, mask: Tensor | None = None, other: int = 0) -> Tensor:
        if mask is None:
            return self.tensor[self.at]
        return torch.where(mask, self.tensor[torch.where(mask, self.at, 0)], other)


def part_of(descriptor: Any, at: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where a block is in a matrix, as far as it is, and where that is in the block."""
    ends = [min(a + n, size) for a, n, size in zip(at, descriptor.block_shape, descriptor.shape, strict=True)]
    inside = tuple(slice(min(a, end), end) for a, end in zip(at, ends, strict=True))
    return inside, tuple(slice(0, max(end - a, 0)) for a, end in zip(at, ends, strict=True))


def copy_in(descriptor: Any, at: list[int], barrier: Barrier, block: Shared) -> None:
    inside, where = part_of(descriptor, at)
    block.data.zero_()
    block.data[where] = descriptor.base[inside]
    barrier.change(nbytes=-block.data.nbytes)


def copy_out(descriptor: Any, at: list[int], block: Shared) -> None:
    inside, where = part_of(descriptor, at)
    descriptor.base[inside] = block.data[where]


def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    return Shared([Barrier() for _ in range(shape[0])] if dtype is torch.int64 else torch.zeros(shape, dtype=dtype))


def multiply(a: Tensor, b: Shared, accumulator: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    assert a.dtype == b.data.dtype == torch.int8
    product = (a.double() @ b.data.double()).to(torch.int32)
    return product + accumulator if use_acc else product


def at_once(functions: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    """Call functions in threads, and raise what one of them has raised."""
    errors: list[BaseException] = []

    def guarded(function: Any, args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=each, daemon=True) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def language(program: int, programs: int) -> SimpleNamespace:
    """Return what kernels use of ``triton.language`` and of Gluon's, for one program."""
    return SimpleNamespace(
        constexpr=lambda value: value,
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        warp_specialize=at_once,
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        where=lambda condition, a, b: a if condition else b,
        minimum=lambda a, b: a.clamp(max=b) if isinstance(a, Tensor) else min(a, b),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        load=lambda pointer, **masked: pointer.load(**masked),
        reshape=lambda x, shape: x.reshape(shape),
        permute=lambda x, order: x.permute(order),
        split=lambda x: x.unbind(-1),
        allocate_shared_memory=allocate,
        NVMMADistributedLayout=lambda *args: None,
        SliceLayout=lambda *args: None,
        DotOperandLayout=lambda *args: None,
        int8=torch.int8,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
    )


def plain(source: Any, program: int, programs: int) -> dict[str, Any]:
    """Return the functions of a module, without a compiler, that see one program's language."""
    constexpr = triton.language.constexpr
    names = {name: value.value if isinstance(value, constexpr) else value for name, value in vars(source).items()}
    names["gl"] = names["tl"] = language(program, programs)
    for name, value in list(names.items()):
        if hasattr(value, "fn") and getattr(value.fn, "__module__", None) == source.__name__:
            function = FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
            function.__kwdefaults__ = value.fn.__kwdefaults__
            names[name] = function
    return names


class Kernel:
    """The kernel, of which each program runs when it is launched."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, launch_pdl: bool, num_warps: int, **constants: Any) -> None:
            args = tuple(Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args)
            for descriptor in (arg for arg in args if hasattr(arg, "block_shape")):
                descriptor.dtype = descriptor.base.dtype
            for program in range(grid[0]):
                self.run(program, grid[0], args, constants)

        return launch

    def run(self, program: int, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        names = plain(module, program, programs)
        shared = plain(epilogue, program, programs)
        shared["activate"] = lambda x, name, dtype: ACTIVATIONS[name](x)
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.initialise(count),
            wait=lambda barrier, phase: barrier.wait(phase),
            arrive=lambda barrier, count: barrier.change(count),
            expect=lambda barrier, nbytes: barrier.change(1, nbytes),
        )
        names |= {
            "finished": shared["finished"],
            "mbarrier": barriers,
            "tma": SimpleNamespace(store_wait=lambda count: None),
            "copy_in": copy_in,
            "copy_out": copy_out,
            "wait_for_threads": lambda: None,
            "warpgroup_mma": multiply,
            "warpgroup_mma_wait": lambda count, deps: deps[0],
            "low_codes_times_16": lambda packed: ((packed << 4) ^ 0x80).view(torch.int8),
            "high_codes_times_16": lambda packed: ((packed & 0xF0) ^ 0x80).view(torch.int8),
            "_keep_until_here": lambda codes: None,
            "fence_async_shared": lambda: None,
            "wait_for_inputs": lambda early: None,
            "let_dependents_start": lambda early: None,
        }
        FunctionType(KERNEL.fn.__code__, names)(*args, **constants)


def run_in_threads(monkeypatch: Any) -> None:
    """Let the kernel run in threads, as on a Hopper with few multiprocessors."""
    device = Device((9, 0), 232448, multiprocessors=PROGRAMS)
    monkeypatch.setattr(module, "describe", lambda _: device)
    monkeypatch.setattr(module, "_int_matmul_hopper", Kernel())
