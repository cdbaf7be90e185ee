"""Progress on stderr: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield items, and show how many are done and how long that took."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (SpinnerColumn(), "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, description=description)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            print(f"{description}: {done}/{len(items)} in {now - start:.0f} s", file=sys.stderr, flush=True)
            last = now
        yield item
