"""A record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from quarot_fx.bench.record import (
    AttentionTime,
    CalibrationTime,
    FusedTime,
    GatedTime,
    HadamardTime,
    MatmulTime,
    MemoryUse,
    ModelTime,
    PeerTime,
    Record,
)


def tables(record: Record) -> Iterator[RenderableType]:
    """Return a table of each part that was run, and after it a line for everything that gave no number."""
    if record.matmul:
        yield _matmul_table(record.matmul)
    if record.peers:
        yield _peer_table(record.matmul, record.peers)
        yield from _reasons((time.peer, time.reason) for time in record.peers)
    if record.fused:
        yield _fused_table(record.fused)
    if record.attention:
        yield _attention_table(record.attention)
    if record.hadamard:
        yield _hadamard_table(record.hadamard)
    if record.gated:
        yield _gated_table(record.gated)
    for title, times in (("one decoder layer", record.layers), ("models with random weights", record.models)):
        if times:
            yield _model_table(title, times)
            yield from _reasons((f"{time.model} {time.phase}, {time.way}", time.reason) for time in times)
    if record.memory:
        yield _memory_table(record.memory)
        yield from _reasons(
            (f"{use.model} {use.sequences} x {use.tokens}, {use.way}", use.reason) for use in record.memory
        )
    if record.calibration:
        yield _calibration_table(record.calibration)
        yield from _reasons((f"{time.model}, {time.layers} layers", time.reason) for time in record.calibration)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def _matmul_table(times: Sequence[MatmulTime]) -> Table:
    numbers = ("tokens", "bfloat16 µs", "quantise µs", "product µs", "both µs", "TOP/s", "speed-up")
    title = "W4A4 product with quantisation of its input, against cuBLAS in bfloat16"
    table = _table(title, ("rows x columns",), numbers)
    for t in times:
        microseconds = (f"{value:.1f}" for value in (t.bfloat16, t.quantize, t.matmul, t.total))
        shape = f"{t.rows} x {t.columns}"
        table.add_row(shape, str(t.tokens), *microseconds, f"{t.tera_operations:.0f}", f"{t.speedup:.2f}x")
    return table


def _peer_table(ours: Sequence[MatmulTime], times: Sequence[PeerTime]) -> Table:
    """One column for each peer that gave a number at all."""
    peers = list(dict.fromkeys(time.peer for time in times if time.speedup))
    speedups = {(time.rows, time.columns, time.tokens, time.peer): time.speedup for time in times}
    table = _table("the same by other libraries: speed-up over bfloat16", ("rows x columns",), ("tokens", "quarot"))
    for peer in peers:
        table.add_column(peer, justify="right")
    for t in ours:
        theirs = (speedups.get((t.rows, t.columns, t.tokens, peer)) for peer in peers)
        cells = (f"{speedup:.2f}x" if speedup else "-" for speedup in (t.speedup, *theirs))
        table.add_row(f"{t.rows} x {t.columns}", str(t.tokens), *cells)
    return table


def _fused_table(times: Sequence[FusedTime]) -> Table:
    numbers = ("rows", "width", "µs", "GB/s", "of a copy")
    table = _table("bfloat16 to codes, by the bytes that must be moved", ("kernel",), numbers)
    for t in times:
        cells = (f"{t.microseconds:.1f}", f"{t.gigabytes_per_second:.0f}", f"{t.of_copy:.0%}")
        table.add_row(t.kernel, str(t.rows), str(t.width), *cells)
    return table


def _attention_table(times: Sequence[AttentionTime]) -> Table:
    numbers = ("bits", "sequences", "keys", "attended to", "PyTorch µs", "µs", "GB/s", "speed-up")
    table = _table("attention of one query a sequence, by the bytes of keys and values", ("PyTorch's kernel",), numbers)
    for t in times:
        attended = "no mask" if t.attended is None else str(t.attended)
        pytorch, speedup = ("-", "-") if t.speedup is None else (f"{t.pytorch:.1f}", f"{t.speedup:.2f}x")
        rates = (pytorch, f"{t.microseconds:.1f}", f"{t.gigabytes_per_second:.0f}", speedup)
        table.add_row(t.backend or "none takes this", str(t.bits), str(t.batch), str(t.keys), attended, *rates)
    return table


def _hadamard_table(times: Sequence[HadamardTime]) -> Table:
    numbers = ("tokens", "bfloat16 µs", "quantise without µs", "with µs", "and product without µs", "with µs", "cost")
    title = "silu x gate, [Hadamard,] quantise, W4A4 product: what the transform costs"
    table = _table(title, ("rows x columns",), numbers)
    for t in times:
        columns = (t.bfloat16, t.plain_quantize, t.rotated_quantize, t.plain, t.rotated)
        microseconds = (f"{value:.1f}" for value in columns)
        table.add_row(f"{t.rows} x {t.columns}", str(t.tokens), *microseconds, f"{t.cost:+.1%}")
    return table


def _gated_table(times: Sequence[GatedTime]) -> Table:
    numbers = ("tokens", "gate, up µs", "to codes µs", "both µs", "gated µs", "to codes µs", "both µs", "speed-up")
    title = "W4A4 product of gate and up, silu x gate, Hadamard, quantise: gated in the product's epilogue or after it"
    table = _table(title, ("rows x columns",), numbers)
    for t in times:
        columns = (t.product, t.quantize, t.separate, t.gated_product, t.gated_quantize, t.gated)
        microseconds = (f"{value:.1f}" for value in columns)
        table.add_row(f"{t.rows} x {t.columns}", str(t.tokens), *microseconds, f"{t.speedup:.2f}x")
    return table


def _model_table(title: str, times: Sequence[ModelTime]) -> Table:
    numbers = (
        "ms",
        "speed-up",
        "weights",
        "cache",
        "peak",
        "compiled in",
        "at a peak of",
        "graphs",
        "without CUDA graph",
    )
    table = _table(title, ("model", "phase", "by"), numbers)
    found = speedups(times)
    for t in times:
        phase = f"{t.phase} {t.sequences} x {t.tokens}"
        if t.milliseconds is None:
            table.add_row(t.model, phase, t.way, *("-" for _ in numbers))
            continue
        speedup = found.get((*t.work, t.way))
        compiled_in = f"{t.compile_seconds:.0f} s" if t.compile_seconds else "-"
        table.add_row(
            t.model, phase, t.way, f"{t.milliseconds:.2f}", f"{speedup:.2f}x" if speedup else "-",
            _gibibytes(t.weight_bytes), _gibibytes(t.cache_bytes), _gibibytes(t.peak_bytes), compiled_in,
            _gibibytes(t.compile_peak_bytes), str(t.graphs), str(t.cudagraph_skips),
        )  # fmt: skip
    return table


def _memory_table(uses: Sequence[MemoryUse]) -> Table:
    numbers = ("sequences", "tokens", "weights", "cache", "allocated for it", "peak of a step", "tokens in all", "")
    table = _table("memory of a model that decodes, by the room of its cache", ("model", "by"), numbers)
    baseline = {use.model: use.total_tokens for use in largest(uses) if use.cache_bits == 16}
    found = {id(use) for use in largest(uses)}
    for use in uses:
        known = (use.weight_bytes, use.cache_bytes, use.allocated_bytes, use.peak_bytes)
        ratio = f"{use.total_tokens / baseline[use.model]:.2f}x" if id(use) in found and use.model in baseline else ""
        cells = (str(use.sequences), str(use.tokens), *map(_gibibytes, known), f"{use.total_tokens:,}", ratio)
        table.add_row(use.model, use.way, *cells)
    return table


def _calibration_table(times: Sequence[CalibrationTime]) -> Table:
    numbers = ("layers", "samples", "tokens of each", "seconds", "weights", "peak")
    table = _table(
        "GPTQ of models with random weights; times of whole models follow from the others", ("model",), numbers
    )
    for t in times:
        seconds = "-" if t.seconds is None else f"{t.seconds:.1f}" if t.is_measured else f"about {t.seconds:.0f}"
        counts = (str(t.layers), str(t.samples), str(t.tokens))
        table.add_row(t.model, *counts, seconds, _gibibytes(t.weight_bytes), _gibibytes(t.peak_bytes))
    return table


def largest(uses: Iterable[MemoryUse]) -> list[MemoryUse]:
    """Return, of each model run in each way, the largest that a step was run with."""
    run = [use for use in uses if use.peak_bytes is not None]
    best = {(use.model, use.way): use for use in sorted(run, key=lambda use: use.total_tokens)}
    return list(best.values())


def speedups(times: Iterable[ModelTime], baseline: str = "bfloat16") -> dict[tuple[str, str, int, int, str], float]:
    """Return how many times faster than the baseline each is, by what was done and how."""
    measured = {(t.work, t.way): t.milliseconds for t in times if t.milliseconds}
    slow = {work: milliseconds for (work, way), milliseconds in measured.items() if way == baseline}
    return {(*work, way): slow[work] / time for (work, way), time in measured.items() if work in slow}


def _gibibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f} GiB"


def _reasons(failures: Iterable[tuple[str, str | None]]) -> Iterator[Text]:
    """Return each line once, as it is: another library's message may look like markup."""
    yield from map(Text, dict.fromkeys(f"{what}: {reason}" for what, reason in failures if reason))
