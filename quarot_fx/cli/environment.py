"""What a number was measured with."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("quarot-fx", "torch", "transformers", "triton")


def describe_environment(device: str, others: Iterable[str] = ()) -> dict[str, Any]:
    """Return versions, of ``others`` too, the processor that ``device`` names, and the number of threads, for JSON."""
    versions = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *others)):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    on_gpu = torch.device(device).type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_gpu else _cpu_name()
    return {"versions": versions, "device": processor, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
