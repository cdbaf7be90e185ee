"""The figures of ``quarot-fx plot``: ranges of activations per channel, and signal to quantisation noise per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType

from quarot_fx.quantization_error import COLUMNS, SQNRReport
from quarot_fx.report import without_index

PANEL = (3.6, 2.2)  # inches
ROTATED, UNROTATED = "with rotation", "without rotation"
SHOWN = 3  # of the inputs that are alike in all layers: the first, one in the middle and the last
SUFFIX = ".weight"


@dataclass(frozen=True)
class SharedInput:
    """An activation that enters one or more linear layers.

    Attributes:
        parameters: of these layers.
        rotated, unrotated: the largest magnitude of each channel, with rotation and without.
    """

    parameters: tuple[str, ...]
    rotated: list[float]
    unrotated: list[float]

    @property
    def name(self) -> str:
        """The first layer that it enters, and how many others."""
        first, *others = (parameter.removesuffix(SUFFIX) for parameter in self.parameters)
        return f"{first} + {len(others)}" if others else first

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {"parameters": list(self.parameters), ROTATED: self.rotated, UNROTATED: self.unrotated}


def inputs_to_draw(rotated: SQNRReport, unrotated: SQNRReport) -> list[SharedInput]:
    """Return the activations that enter linear layers, of those that are alike in all layers a few."""
    alike: dict[str, list[SharedInput]] = defaultdict(list)
    for one in _all_inputs(rotated, unrotated):
        alike[without_index(one.name)].append(one)
    return [inputs[place] for inputs in alike.values() for place in _spread(len(inputs))]


def _all_inputs(rotated: SQNRReport, unrotated: SQNRReport) -> Iterator[SharedInput]:
    """Yield what enters linear layers, once for neighbours that share it. Heads and routers do not count."""
    pending: list[str] = []
    latest: tuple[torch.Tensor, torch.Tensor] | None = None
    for after, before in zip(rotated.layers, unrotated.layers, strict=True):
        if after.linear.role:
            continue
        if latest is not None and not torch.equal(latest[1], before.ranges):
            yield SharedInput(tuple(pending), *(ranges.tolist() for ranges in latest))
            pending = []
        pending.append(after.linear.parameter)
        latest = after.ranges, before.ranges
    if latest is not None:
        yield SharedInput(tuple(pending), *(ranges.tolist() for ranges in latest))


def _spread(count: int) -> list[int]:
    """Return a few places among so many, from the first to the last."""
    return sorted({round(place * (count - 1) / (SHOWN - 1)) for place in range(SHOWN)})


def draw_ranges(inputs: Sequence[SharedInput], title: str, path: Path) -> None:
    """Draw the largest magnitude of each channel, a panel an input, one row for those that are alike."""
    rows: dict[str, list[SharedInput]] = defaultdict(list)
    for one in inputs:
        rows[without_index(one.name)].append(one)
    columns = max(len(row) for row in rows.values())
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * len(rows)), layout="constrained")
    for row, alike in enumerate(rows.values()):
        for column, one in enumerate(alike):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            axes.plot(one.unrotated, label=UNROTATED, linewidth=0.7, color="tab:red")
            axes.plot(one.rotated, label=ROTATED, linewidth=0.7, color="tab:blue")
            axes.set_yscale("log")
            axes.set_title(one.name, fontsize="x-small")
            axes.tick_params(which="both", labelsize="xx-small")
            axes.set_xlabel("channel", fontsize="x-small")
            axes.set_ylabel("largest |x|", fontsize="x-small")
    axes.legend(fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def draw_sqnr(rotated: SQNRReport, unrotated: SQNRReport, title: str, path: Path) -> None:
    """Draw ratios over layers: a panel each for weights, activations (keys and values too) and outputs."""
    figure = Figure(figsize=(PANEL[0] * 1.5 * len(COLUMNS), PANEL[1] * 2), layout="constrained")
    curves = {ROTATED: _curves(rotated), UNROTATED: _curves(unrotated)}
    kinds = list(dict.fromkeys(kind for column in curves[ROTATED].values() for kind in column))
    colors = {kind: f"C{place % 10}" for place, kind in enumerate(kinds)}
    styles: dict[str, LineStyleType] = {ROTATED: "-", UNROTATED: ":"}
    for place, column in enumerate(COLUMNS):
        axes = figure.add_subplot(1, len(COLUMNS), place + 1)
        for how, style in styles.items():
            for kind, ratios in curves[how][column].items():
                axes.plot(ratios, linestyle=style, color=colors[kind], marker=".", markersize=3, linewidth=1)
        axes.set_title(column)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("signal to quantisation noise, dB")
    handles = [Line2D([], [], color=color, label=kind) for kind, color in colors.items()]
    handles += [Line2D([], [], color="black", linestyle=style, label=how) for how, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def _curves(report: SQNRReport) -> dict[str, dict[str, list[float]]]:
    """Return ratios by column and by what is alike in all layers."""
    curves: dict[str, dict[str, list[float]]] = {column: defaultdict(list) for column in COLUMNS}
    for layer in report.layers:
        for column in COLUMNS:
            if (ratio := getattr(layer, column)) is not None:
                curves[column][without_index(layer.linear.parameter.removesuffix(SUFFIX))].append(ratio)
    for one in report.caches:
        if one.sqnr is not None:
            curves["activation"][f"{one.cache.kind}s"].append(one.sqnr)
    return curves
