"""Models of well-known shapes with random weights, compiled by Inductor and by quarot: prefill, decode and memory.

A decoder layer is what a model of three layers takes longer than one of one, by two. So measured, it stands where it
stands in a model: the basis of the residual stream costs it nothing, and neither embedding nor output head is counted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from quarot_fx.bench.memory import Memory
from quarot_fx.bench.record import ModelTime
from quarot_fx.bench.shapes import DecoderShape
from quarot_fx.bench.timing import STEPS, WARM_UPS, milliseconds

PHASES = ("prefill", "decode")
BFLOAT16 = 16  # bits
TOKENS = 2048
MODE = "reduce-overhead"  # CUDA graphs
FEW_LAYERS, MORE_LAYERS = 1, 3  # whose difference is a layer's
OPTIONS: Mapping[str, Any] = {"kv_bits": 16, "free_originals": True}  # the cache is an ordinary one
CALLS_BEFORE = 3  # of which a CUDA graph is made: the first compiles, the second is recorded
STEPS_IN_CACHE = CALLS_BEFORE + WARM_UPS + STEPS  # each is a token

Compile = Callable[[nn.Module], Callable[..., Any]]


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        tokens: of a sequence that prefill takes at once, and that the cache holds when decode starts.
        sequences: that run together.
        cache_bits: of the keys and values in the cache that decode reads; 16 is a ``StaticCache`` in bfloat16.
        phases: of ``PHASES``, those to run.
        device: where.
        clock: of a step, in milliseconds.
    """

    tokens: int = TOKENS
    sequences: int = 1
    cache_bits: int = BFLOAT16
    phases: tuple[str, ...] = PHASES
    device: str = "cuda"
    clock: Callable[[Callable[[], object]], float] = milliseconds


def compilers(options: Mapping[str, Any]) -> dict[str, Compile]:
    """Return what compiles a model, by name, both with CUDA graphs; ``options`` are quarot's, besides ``OPTIONS``."""
    return {
        "bfloat16": partial(torch.compile, mode=MODE, dynamic=False),
        "quarot": partial(torch.compile, backend="quarot", options={"mode": MODE, **OPTIONS, **options}, dynamic=False),
    }


def measure_models(
    shapes: Mapping[str, DecoderShape], compilers: Mapping[str, Compile], workload: Workload
) -> Iterator[ModelTime]:
    """Measure whole models."""
    for name, shape in shapes.items():
        for backend, compile_model in compilers.items():
            yield from measure_model(name, shape, shape.layers, backend, compile_model, workload)


def measure_layers(
    shapes: Mapping[str, DecoderShape], compilers: Mapping[str, Compile], workload: Workload
) -> Iterator[ModelTime]:
    """Measure one decoder layer of each shape."""
    for name, shape in shapes.items():
        for backend, compile_model in compilers.items():
            few, more = (
                list(measure_model(name, shape, layers, backend, compile_model, workload))
                for layers in (FEW_LAYERS, MORE_LAYERS)
            )
            yield from map(one_layer, few, more)


def one_layer(few: ModelTime, more: ModelTime) -> ModelTime:
    """Return what each of the layers takes that ``more`` has and ``few`` has not; what failed, if either did."""
    if failed := next((time for time in (few, more) if time.reason), None):
        return replace(failed, layers=1)
    milliseconds = (more.milliseconds - few.milliseconds) / (more.layers - few.layers)  # type: ignore[operator]
    # Memory is no such difference: a CUDA graph's pool has what the larger tensors of either model need.
    return replace(
        more, layers=1, milliseconds=milliseconds, compile_seconds=None, weight_bytes=None, peak_bytes=None,
        compile_peak_bytes=None, cache_bytes=None,
    )  # fmt: skip


def measure_model(
    name: str, shape: DecoderShape, layers: int, backend: str, compile_model: Compile, workload: Workload
) -> Iterator[ModelTime]:
    """Measure each phase of a model of so many layers. What cannot be measured gives a row with the reason."""
    for phase in workload.phases:
        blank = ModelTime(
            name, layers, backend, phase, workload.tokens, sequences=workload.sequences, cache_bits=workload.cache_bits
        )
        yield _measure_phase(blank, shape, compile_model, workload)


def _measure_phase(blank: ModelTime, shape: DecoderShape, compile_model: Compile, workload: Workload) -> ModelTime:
    try:
        with forgotten(), torch.no_grad():
            return _measured(blank, shape, compile_model, workload)
    except Exception as error:  # out of memory, most of all, and then the rest shall go on
        return replace(blank, reason=f"{type(error).__name__}: {error}")


def random_model(shape: DecoderShape, layers: int, workload: Workload) -> Any:
    """Return a decoder in bfloat16 in evaluation mode; weights are normal with a deviation of 0.02, and gains are 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = shape.config(layers, positions=_cache_length(workload))
    with torch.device(workload.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _cache_length(workload: Workload) -> int:
    """Return the positions of a cache that has room for every step, in whole groups of 128."""
    return 128 * -(-(workload.tokens + STEPS_IN_CACHE) // 128)


def _measured(blank: ModelTime, shape: DecoderShape, compile_model: Compile, workload: Workload) -> ModelTime:
    """Measure a model of its own: one that was compiled without a cache has other weights than one with a cache."""
    memory = Memory(workload.device)
    model = random_model(shape, blank.layers, workload)
    compiled = compile_model(model)
    arguments, cache_bytes = _arguments(blank.phase, model, workload)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        compiled(**arguments, logits_to_keep=1)

    counters.clear()
    memory.peak()
    compile_seconds = seconds(step, workload.device)
    compile_peak = memory.peak()
    for _ in range(CALLS_BEFORE - 1):
        step()
    gc.collect()
    held = memory.held()
    return replace(
        blank,
        milliseconds=workload.clock(step),
        compile_seconds=compile_seconds,
        graphs=counters["stats"]["unique_graphs"],
        cudagraph_skips=counters["inductor"]["cudagraph_skips"],
        weight_bytes=None if held is None else held - cache_bytes,
        cache_bytes=cache_bytes,
        peak_bytes=memory.peak(),
        compile_peak_bytes=compile_peak,
    )


def _arguments(phase: str, model: Any, workload: Workload) -> tuple[dict[str, Any], int]:
    """Return what the model is called with, and the bytes of the cache among it."""
    tokens = workload.tokens if phase == "prefill" else 1
    ids = torch.randint(model.config.vocab_size, (workload.sequences, tokens), device=workload.device)
    if phase == "prefill":
        return {"input_ids": ids, "use_cache": False}, 0
    cache, cache_bytes = random_cache(model.config, workload)
    return {"input_ids": ids, "past_key_values": cache}, cache_bytes


def random_cache(config: Any, workload: Workload) -> tuple[Any, int]:
    """Return a static cache with random keys and values of so many tokens, and their bytes."""
    from transformers import StaticCache

    from quarot_fx.cache.quarot_cache import QuarotCache

    length, head = _cache_length(workload), config.hidden_size // config.num_attention_heads
    is_packed = workload.cache_bits != BFLOAT16
    cache: Any = (
        QuarotCache(config, length, kv_bits=workload.cache_bits)
        if is_packed
        else StaticCache(config=config, max_cache_len=length)
    )
    cache.early_initialization(
        workload.sequences, config.num_key_value_heads, head, torch.bfloat16, torch.device(workload.device)
    )
    for layer in cache.layers:
        (_fill_packed if is_packed else _fill)(layer, workload.tokens)
    return cache, cache.nbytes if is_packed else sum(one.keys.nbytes + one.values.nbytes for one in cache.layers)


def _fill(layer: Any, tokens: int) -> None:
    layer.keys.normal_()
    layer.values.normal_()
    layer.cumulative_length.fill_(tokens)


def _fill_packed(layer: Any, tokens: int) -> None:
    """Fill a layer with codes of numbers about as large as normal ones."""
    for packed in layer.packed:
        codes, scale, zero = packed.parts
        codes.random_(256)
        scale.uniform_(0.3, 0.5)
        zero.random_(6, 10)
    layer.length.fill_(tokens)
    layer.is_empty = False


@contextmanager
def forgotten() -> Iterator[None]:
    """Start and end with nothing compiled, and with the memory free that only compiled graphs held."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds(step: Callable[[], object], device: str) -> float:
    """Return what one call takes, until the device has done all of it."""
    started = perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - started
