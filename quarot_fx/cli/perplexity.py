"""Perplexity as GPTQ and QuaRot measure it: the whole text tokenised once, windows that do not overlap."""

from __future__ import annotations

import hashlib
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from quarot_fx.errors import NotFoundError, OptionError
from quarot_fx.extras import import_extra


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


def read_text(name: str) -> str:
    """Return a file's text, ``"wikitext2"`` (raw test split) or ``"pydoc"`` (English that every Python has).

    Raises:
        NotFoundError: it is neither a name nor a file.
        MissingExtraError: WikiText-2 was asked for and ``datasets`` is not installed.
    """
    if name == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[topic] for topic in sorted(topics))
    if name == "wikitext2":
        datasets = import_extra("datasets", extra="eval")
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return "\n\n".join(rows["text"])
    path = Path(name)
    if not path.is_file():
        raise NotFoundError(kind="text", name=name, remedy="Give a text file, 'wikitext2' or 'pydoc'.")
    return path.read_text(encoding="utf-8")


def fingerprint(text: str) -> str:
    """Return the SHA-256 of a text, to tell whether two runs read the same."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_windows(text: str, tokenizer: Any, length: int, count: int | None = None) -> torch.Tensor:
    """Tokenise the whole text and cut it into windows; the tail that fills none is dropped.

    Returns:
        int64 token ids of shape [windows, length]; the first ``count`` windows if given.

    Raises:
        OptionError: the text does not fill one window.
    """
    token_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    total = len(token_ids)
    if total < length:
        raise OptionError(name="window_length", value=length, reason=f"the text has only {total} tokens")
    return token_ids[: total - total % length].view(-1, length)[:count]


@torch.no_grad()
def window_loss(model: Any, window: torch.Tensor) -> float:
    """Return the mean negative log-likelihood (float32, in nats) of a window of shape [length]."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), window[1:]).item()


def measure(model: Any, windows: torch.Tensor, label: str) -> Measurement:
    """Return the perplexity of ``windows`` [windows, length] under a model, with a progress bar on stderr."""
    columns = (SpinnerColumn(), "{task.description}", BarColumn(), MofNCompleteColumn())
    losses, clock = [], [time.perf_counter()]
    console = Console(stderr=True)
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar as progress:
        for window in progress.track(windows, description=label):
            losses.append(window_loss(model, window))
            clock.append(time.perf_counter())
    perplexity = torch.tensor(losses, dtype=torch.float64).mean().exp().item()
    return Measurement(perplexity, first_seconds=clock[1] - clock[0], seconds=clock[-1] - clock[0])
