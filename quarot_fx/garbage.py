"""Python's garbage collector, while graphs are made: they are millions of small objects, and nearly all of them stay.

The collector walks all young objects after every few hundred new ones, which takes two fifths of the time to plan a
deep model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 100_000  # between two collections: some ten megabytes of garbage, at most


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Let the collector wait for ``NEW_OBJECTS``, unless it is off or waits longer already."""
    before, *rest = gc.get_threshold()
    gc.set_threshold(max(before, NEW_OBJECTS) if before else 0, *rest)
    try:
        yield
    finally:
        gc.set_threshold(before, *rest)
