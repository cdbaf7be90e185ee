"""Memory of a GPU that PyTorch has allocated, over what it had before."""

from __future__ import annotations

import torch


class Memory:
    """Bytes allocated on a device since this object was made; ``None`` on a device other than a GPU."""

    def __init__(self, device: str) -> None:
        self._counts = torch.device(device).type == "cuda"
        self._before = torch.cuda.memory_allocated() if self._counts else 0

    def held(self) -> int | None:
        """Return what is allocated now."""
        return torch.cuda.memory_allocated() - self._before if self._counts else None

    def peak(self) -> int | None:
        """Return the most that was allocated at once since the last call, or since this object was made."""
        if not self._counts:
            return None
        peak = torch.cuda.max_memory_allocated() - self._before
        torch.cuda.reset_peak_memory_stats()
        return peak
