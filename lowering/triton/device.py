"""What a device can do, as far as kernels choose by it. Touches CUDA only when asked about a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from quarot_fx.devices import with_index

FIRST_SUPPORTED = (8, 0)  # Ampere: int8 tensor cores by mma.sync, asynchronous copies
FIRST_FLOAT8 = (8, 9)
HOPPER = (9, 0)


@dataclass(frozen=True)
class Device:
    """A device that kernels run on.

    Attributes:
        capability: CUDA's compute capability; that of Ampere for the interpreter, which has no special units.
        shared_bytes: shared memory that one program may have.
        multiprocessors: how many there are to give programs to; a few for the interpreter, so that work is split.
    """

    capability: tuple[int, int]
    shared_bytes: int
    multiprocessors: int

    @property
    def has_tma(self) -> bool:
        """Whether tensor tiles can be copied by the tensor memory accelerator."""
        return self.capability >= HOPPER

    @property
    def has_wgmma(self) -> bool:
        """Whether groups of four warps multiply together, from shared memory, as on Hopper alone."""
        return self.capability[0] == HOPPER[0]

    @property
    def has_pairs(self) -> bool:
        """Whether two integers of 16 bits are clamped by one instruction; the interpreter has another for it."""
        return self is INTERPRETER or self.capability >= HOPPER

    @property
    def starts_early(self) -> bool:
        """Whether a kernel may be started before the one ahead of it has ended (programmatic dependent launch)."""
        return self.capability >= HOPPER


INTERPRETER = Device(FIRST_SUPPORTED, 2**30, multiprocessors=4)


@lru_cache
def _cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    capability, shared_bytes = (properties.major, properties.minor), properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(capability, shared_bytes, properties.multi_processor_count)


def describe(device: torch.device) -> Device:
    """Return what a device can do; the CPU is the interpreter's."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_device(with_index(device))


def runs_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` asks for kernels to run on the CPU, one numpy operation at a time."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
