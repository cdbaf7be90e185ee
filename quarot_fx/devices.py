"""What a device is called."""

from __future__ import annotations

import torch


def with_index(device: torch.device) -> torch.device:
    """Return a device with its number, as tensors' devices have one: CUDA without a number means the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
