"""Perplexity as GPTQ and QuaRot measure it: the whole text tokenised once, windows that do not overlap."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from quarot_fx.progress import progress_bar


@dataclass(frozen=True)
class Measurement:
    """Perplexity of one setting.

    Attributes:
        perplexity: exp of the mean loss over all windows.
        first_seconds: of the first window, which compilation belongs to.
        seconds: of all windows.
    """

    perplexity: float
    first_seconds: float
    seconds: float


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text, whose perplexity is to be measured.

    Attributes:
        name: of the text.
        sha256: of the text.
        token_ids: int64 [windows, length].
    """

    name: str
    sha256: str
    token_ids: torch.Tensor

    @property
    def title(self) -> str:
        """What is measured, in words."""
        windows, length = self.token_ids.shape
        return f"{self.name}, {windows} windows of {length} tokens"

    @property
    def about(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        windows, length = self.token_ids.shape
        return {"text": {"name": self.name, "sha256": self.sha256}, "windows": windows, "window_length": length}


@torch.no_grad()
def window_loss(model: Any, window: torch.Tensor) -> float:
    """Return the mean negative log-likelihood (float32, in nats) of a window of shape [length]."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), window[1:]).item()


def measure(model: Any, windows: torch.Tensor, label: str) -> Measurement:
    """Return the perplexity of ``windows`` [windows, length] under a model, with a progress bar on stderr."""
    losses, clock = [], [time.perf_counter()]
    with progress_bar() as progress:
        for window in progress.track(windows, description=label):
            losses.append(window_loss(model, window))
            clock.append(time.perf_counter())
    perplexity = torch.tensor(losses, dtype=torch.float64).mean().exp().item()
    return Measurement(perplexity, first_seconds=clock[1] - clock[0], seconds=clock[-1] - clock[0])
