"""A record as a figure: speed-up of the products over tokens, prefill and decode as bars, and memory over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from quarot_fx.bench.record import MemoryUse, ModelTime, Record
from quarot_fx.bench.tables import largest
from quarot_fx.errors import OptionError

COLUMNS = 4
PANEL = (3.6, 2.8)  # inches
OURS = "quarot W4A4"
BASELINE = "bfloat16"

Line = tuple[list[int], list[float]]  # tokens, speed-ups
Panel = tuple[str, Callable[[Any], None]]  # its title, and what draws it on axes


def plot(record: Record, path: Path) -> None:
    """Draw a record into a file, in the format that its name ends with.

    Raises:
        OptionError: there is nothing in the record to draw, or no such format.
    """
    panels: list[Panel] = [*_products(record), *_models(record), *_memory(record)]
    if not panels:
        reason = "there is nothing to draw: of the parts, matmul, layers, models and memory are"
        raise OptionError(name="plot", value=str(path), reason=reason)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    for index, (title, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(title, fontsize="medium")
        draw(axes)
    figure.suptitle(str(record.environment.get("device", "")))
    try:
        figure.savefig(path)
    except ValueError as error:  # matplotlib names the formats that it knows
        raise OptionError(name="plot", value=str(path), reason=str(error)) from error


def _products(record: Record) -> Iterator[Panel]:
    for rows, columns in dict.fromkeys((time.rows, time.columns) for time in record.matmul):
        ours = [(OURS, t.tokens, t.speedup) for t in record.matmul if (t.rows, t.columns) == (rows, columns)]
        theirs = [
            (t.peer, t.tokens, t.speedup) for t in record.peers if (t.rows, t.columns) == (rows, columns) and t.speedup
        ]
        lines: dict[str, Line] = {}
        for name, tokens, speedup in ours + theirs:
            xs, ys = lines.setdefault(name, ([], []))
            xs.append(tokens)
            ys.append(speedup)
        yield f"{rows} x {columns}", partial(_draw_lines, lines=lines)


def _draw_lines(axes: Any, lines: dict[str, Line]) -> None:
    for name, (tokens, speedups) in lines.items():
        axes.plot(tokens, speedups, marker=".", label=name, linewidth=2 if name == OURS else 1)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"speed-up over {BASELINE}")
    axes.legend(fontsize="x-small")


def _models(record: Record) -> Iterator[Panel]:
    for what, times in (("a layer", record.layers), ("model", record.models)):
        for phase in dict.fromkeys(time.phase for time in times):
            if measured := [time for time in times if time.phase == phase and time.milliseconds]:
                yield f"{what}: {phase}", partial(_draw_bars, times=measured)


def _draw_bars(axes: Any, times: Sequence[ModelTime]) -> None:
    work = list(dict.fromkeys(time.work for time in times))
    ways = list(dict.fromkeys(time.way for time in times))
    width = 0.8 / len(ways)
    for index, way in enumerate(ways):
        done_so = [time for time in times if time.way == way]
        places = [work.index(time.work) + index * width for time in done_so]
        bars = axes.bar(places, [time.milliseconds for time in done_so], width, label=way)
        axes.bar_label(bars, fmt="%.3g", fontsize="x-small")
    centre = width * (len(ways) - 1) / 2
    names = [f"{model}\n{sequences} x {tokens} tokens" for model, _, sequences, tokens in work]
    axes.set_xticks([place + centre for place in range(len(names))], names, fontsize="small")
    axes.set_ylabel("ms")
    axes.legend(fontsize="x-small")


def _memory(record: Record) -> Iterator[Panel]:
    for model in dict.fromkeys(use.model for use in record.memory):
        yield f"{model}: memory", partial(_draw_memory, uses=[use for use in record.memory if use.model == model])


def _draw_memory(axes: Any, uses: Sequence[MemoryUse]) -> None:
    """Draw weights and cache as computed for any number of tokens, and the peak of the largest that was run."""
    for index, way in enumerate(dict.fromkeys(use.way for use in uses)):
        sized = sorted((use for use in uses if use.way == way and not use.reason), key=lambda use: use.total_tokens)
        totals = [((use.weight_bytes or 0) + (use.cache_bytes or 0)) / 2**30 for use in sized]
        axes.plot([use.total_tokens for use in sized], totals, marker=".", label=way, color=f"C{index}")
        for use in largest(sized):
            axes.plot(use.total_tokens, (use.peak_bytes or 0) / 2**30, marker="*", markersize=10, color=f"C{index}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:,.0f}k")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache (star: the most that fit)")
    axes.set_ylabel("GiB of weights and cache")
    axes.legend(fontsize="x-small")
