from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter, which it decides on when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._dynamo.utils import counters


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let only the tests that are about kernels, marked so, have graphs lowered to interpreted ones: they are slow.

    A hook and no fixture, since what tests of a module share is made before any fixture of a test.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("kernels") is None:
            patch.setattr("quarot_fx.lowering.triton.support.runs_interpreted", lambda: False)
        return (yield)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny Llama and its tokenizer, for commands that read it."""
    from models import save_tiny_model  # transformers, which tests of kernels start without

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def graphs():
    """Count the graphs that are compiled from here on, in a Dynamo that remembers none: ``graphs()``."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def fresh_dynamo():
    """Seed, forget what was compiled and counted, and run the test without gradients."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
