"""Perplexity as GPTQ and QuaRot measure it: the whole text tokenised once, windows that do not overlap."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from quarot_fx.progress import track


@dataclass(frozen=True)
class Measurement:
    """Perplexity of one setting.

    Attributes:
        perplexity: exp of the mean loss over all windows.
        first_seconds: of the first batch of windows, which compilation belongs to.
        seconds: of all windows.
    """

    perplexity: float
    first_seconds: float
    seconds: float


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood (in nats) of each of some windows [n, length], float32 [n]."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    losses = [F.cross_entropy(one.float(), window[1:]) for one, window in zip(logits, windows, strict=True)]
    return torch.stack(losses)


def measure(model: Any, windows: torch.Tensor, label: str, batch: int = 1) -> Measurement:
    """Return the perplexity of ``windows`` [n, length] under a model, ``batch`` of them at a time; shows progress.

    A last batch that is not full is filled up, so that one compiled shape serves for all.
    """
    losses, clock = [], [time.perf_counter()]
    for part in track(windows.split(batch), label):
        filled = torch.cat([part, part[-1:].expand(batch - len(part), -1)])
        losses += window_losses(model, filled)[: len(part)].tolist()
        clock.append(time.perf_counter())
    perplexity = torch.tensor(losses, dtype=torch.float64).mean().exp().item()
    return Measurement(perplexity, first_seconds=clock[1] - clock[0], seconds=clock[-1] - clock[0])
