"""``quarot-fx bench memory``: what caches take, and the search for the largest, on a CPU whose tensors are counted."""

from __future__ import annotations

import gc

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from quarot_fx import QuarotCache
from quarot_fx.bench import capacity
from quarot_fx.bench.capacity import GROUP, LESS, measure_capacity, token_bytes, ways
from quarot_fx.bench.record import MemoryUse, Record
from quarot_fx.bench.shapes import MODELS, DecoderShape
from quarot_fx.bench.tables import largest, tables

TINY = DecoderShape(256, 704, 4, heads=4, key_value_heads=2, vocabulary=256)
GPU = 32 * 2**20  # bytes
FIRST = 128  # tokens
WORKING = 2**18  # bytes that a step takes besides
USES = [
    MemoryUse("A", "quarot", 4, 16, 2048, 100, 10),
    MemoryUse("A", "quarot", 4, 16, 8192, 100, 40, 41, 150),
    MemoryUse("A", "bfloat16", 16, 16, 4096, 300, 80, reason="OutOfMemoryError: too large [/for] this"),
    MemoryUse("A", "bfloat16", 16, 16, 2048, 300, 40, 40, 350),
]


class CountedTensors:
    """Stands for the allocator of a GPU: bytes of all tensors that there are."""

    def __init__(self, device):
        gc.collect()
        self.before = 0
        self.before = self.held()

    def held(self):
        tensors = (one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
        storages = {
            one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors if one.device.type == "cpu"
        }
        return sum(storages.values()) - self.before

    def peak(self):
        return self.held() + WORKING


@pytest.fixture
def small_gpu(monkeypatch, fresh_dynamo):
    make, failures = capacity.random_cache, iter([True, True])

    def unlucky_twice(config, workload):
        if workload.tokens > FIRST and next(failures, False):
            raise torch.OutOfMemoryError("it is full\nand more lines")
        return make(config, workload)

    monkeypatch.setattr(capacity, "Memory", CountedTensors)
    monkeypatch.setattr(capacity, "_free", lambda device: GPU)
    monkeypatch.setattr(capacity, "SPARE", 0)
    monkeypatch.setattr(capacity, "FIRST", FIRST)
    monkeypatch.setattr(capacity, "random_cache", unlucky_twice)


def test_bytes_of_a_token():
    llama = MODELS["Llama-3-8B"]
    assert token_bytes(llama, 16) == 32 * 2 * 8 * 128 * 2
    assert token_bytes(llama, 4) == 32 * 2 * 8 * (64 + 4 + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("way", [pytest.param(way, id=way.backend) for way in ways({"kernels": "none"}, 4)])
def test_the_largest_cache(way):
    *computed, found = measure_capacity("tiny", TINY, way, 2, "cpu")
    a_token = 2 * token_bytes(TINY, way.cache_bits)
    tried = [use for use in computed if use.reason]
    assert [use.reason for use in tried] == ["OutOfMemoryError: it is full"] * 2
    assert found.tokens == pytest.approx(tried[0].tokens * LESS**2, abs=2 * GROUP)
    assert 0.9 * GPU < tried[0].weight_bytes + WORKING + a_token * tried[0].tokens < GPU
    assert {use.weight_bytes for use in computed} == {computed[0].weight_bytes}
    assert all(use.cache_bytes == a_token * use.tokens for use in computed if not use.reason)
    assert found.cache_bytes == a_token * found.tokens
    assert found.allocated_bytes == pytest.approx(found.cache_bytes, rel=0.01)
    assert found.peak_bytes == pytest.approx(found.weight_bytes + found.cache_bytes + WORKING, rel=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("small_gpu")
def test_weights_are_those_of_all_layers():
    (*_, found) = measure_capacity("tiny", TINY, ways({}, 4)[1], 2, "cpu")
    model = TINY.config(TINY.layers, 128)
    expected = sum(p.nbytes for p in AutoModelForCausalLM.from_config(model, dtype=torch.bfloat16).parameters())
    assert found.weight_bytes == pytest.approx(expected, rel=0.02)


def test_a_device_that_counts_nothing_is_named():
    (only,) = measure_capacity("tiny", TINY, ways({}, 4)[1], 1, "cpu")
    assert only.reason == "memory is not counted on this device"


def test_the_largest_that_was_run_is_drawn_and_compared(tmp_path):
    assert [use.tokens for use in largest(USES)] == [2048, 8192]
    console = Console(width=200)
    with console.capture() as capture:
        for table in tables(Record({}, memory=USES)):
            console.print(table)
    text = capture.get()
    assert "4.00x" in text
    assert "OutOfMemoryError: too large [/for] this" in text
    pytest.importorskip("matplotlib")
    from quarot_fx.bench.plot import plot

    plot(Record({"device": "a GPU"}, memory=USES), tmp_path / "memory.svg")
    assert "A: memory" in (tmp_path / "memory.svg").read_text()


def test_a_cache_says_what_is_allocated():
    cache = QuarotCache(TINY.config(4, 128), 128)
    before = CountedTensors("cpu")
    cache.early_initialization(3, 2, 16, torch.bfloat16, torch.device("cpu"))
    assert before.held() == pytest.approx(cache.nbytes, abs=4 * 16)  # and the lengths
