from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def graphs():
    """Count the graphs that are compiled from here on, in a Dynamo that remembers none: ``graphs()``."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
