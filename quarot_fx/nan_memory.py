"""Memory that reads as NaN, however much of it, and takes two megabytes on an NVIDIA GPU.

There the same physical memory is mapped again and again into a range of addresses, by the driver's functions for
virtual memory, which PyTorch has no call for. Elsewhere it is as large as it looks.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from quarot_fx.devices import with_index

_BYTE = 0xFF  # repeated, it is NaN in every floating-point dtype, of 8 to 64 bits

_MEMORY: dict[torch.device, torch.Tensor] = {}


def nan_memory(size: int, device: torch.device) -> torch.Tensor:
    """Return uint8 [at least size], on a device, of which any floating-point view is NaN. All callers share it."""
    device = with_index(device)
    memory = _MEMORY.get(device)
    if memory is None or memory.numel() < size:
        memory = _MEMORY[device] = _mapped(size, device)
    return memory


def restore_nan_memory(device: torch.device) -> None:
    """Undo what somebody wrote to memory on the device of a tensor, which all callers would read."""
    _MEMORY[device].fill_(_BYTE)


def _mapped(size: int, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and torch.version.hip is None:
        try:
            return _range(size, device)
        except (OSError, AttributeError, _DriverError) as error:
            warnings.warn(
                f"freed weights share {size / 2**20:.0f} MiB of {device}, not 2: the driver cannot map memory"
                f" repeatedly ({error})",
                stacklevel=2,
            )
    return torch.full((size,), _BYTE, dtype=torch.uint8, device=device)


# -- the driver ------------------------------------------------------------------------------------


class _DriverError(Exception):
    pass


class _Location(ctypes.Structure):  # CUmemLocation
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_meta_data", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_PINNED = _ON_DEVICE = 1  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE
_READ_AND_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")


def _call(name: str, *args: object) -> None:
    if code := getattr(_driver(), name)(*args):
        raise _DriverError(f"{name} returned {code}")


@cache
def _page(device: int) -> tuple[ctypes.c_uint64, int]:
    """Return the handle and the bytes of physical memory of a device, the smallest there is. It is never released."""
    properties = _Properties(type=_PINNED, location=_Location(_ON_DEVICE, device))
    granularity, handle = ctypes.c_size_t(), ctypes.c_uint64()
    _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), ctypes.c_int(0))
    _call("cuMemCreate", ctypes.byref(handle), granularity, ctypes.byref(properties), ctypes.c_uint64(0))
    return handle, granularity.value


@dataclass(frozen=True)
class _Bytes:
    start: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.start, False), "version": 3}


def _range(size: int, device: torch.device) -> torch.Tensor:
    """Return at least ``size`` bytes that are all the device's page; they are mapped as long as the process lives."""
    torch.cuda.synchronize(device)  # makes the device's context, which the driver's functions need
    handle, page = _page(device.index)
    size = -(-size // page) * page
    start, none = ctypes.c_uint64(), ctypes.c_uint64(0)
    length, whole = ctypes.c_size_t(page), ctypes.c_size_t(size)
    _call("cuMemAddressReserve", ctypes.byref(start), whole, ctypes.c_size_t(0), none, none)
    for offset in range(0, size, page):
        _call("cuMemMap", ctypes.c_uint64(start.value + offset), length, ctypes.c_size_t(0), handle, none)
    access = _Access(_Location(_ON_DEVICE, device.index), _READ_AND_WRITE)
    _call("cuMemSetAccess", start, whole, ctypes.byref(access), ctypes.c_size_t(1))
    torch.as_tensor(_Bytes(start.value, page), device=device).fill_(_BYTE)  # and so all of it
    return torch.as_tensor(_Bytes(start.value, size), device=device)
