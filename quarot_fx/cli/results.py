"""What ``quarot-fx eval`` measured, setting by setting: as JSON, as a table for a terminal and as one for documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from quarot_fx.cli.tasks import headline
from quarot_fx.files import write_text


@dataclass
class Results:
    """The results of all settings so far.

    Attributes:
        title: of tables.
        about: what was measured, how, and with what; JSON begins with it.
        rows: a result for each setting: ``setting``, ``options``, and what was measured; or the ``reason`` why nothing
            was.
    """

    title: str
    about: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Add a setting's result; ``ratio`` is that of its perplexity to the float model's, wherever it is measured."""
        self.rows.append(row)
        measured = [one for one in self.rows if "perplexity" in one]
        floats = [one["perplexity"] for one in measured if one["options"] is None]
        for one in measured:
            one["ratio"] = one["perplexity"] / floats[0] if floats else None

    def write(self, path: Path) -> None:
        """Replace a file by JSON, as a whole: what was measured stays readable while the rest is measured."""
        write_text(path, json.dumps({**self.about, "results": self.rows}, indent=2) + "\n")

    def latest(self) -> str:
        """Return a line on the setting that was measured last."""
        row = self.rows[-1]
        cells = [f"{name} {text}" for name, cell in self._columns() if (text := cell(row))]
        return f"{row['setting']}: {row.get('reason') or ', '.join(cells)}"

    def table(self) -> Table:
        """Return a table for a terminal."""
        table = Table(title=self.title)
        table.add_column("setting", no_wrap=True)
        columns = list(self._columns())
        for name, _ in columns:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(row["setting"], *(cell(row) for _, cell in columns))
        return table

    def markdown(self) -> str:
        """Return a table for a document, with a line below it on where it comes from. Times are not in it."""
        columns = [(name, cell) for name, cell in self._columns() if name not in TIMES]
        lines = [["setting", *(name for name, _ in columns)], ["---"] * (len(columns) + 1)]
        lines += [[row["setting"], *(cell(row) for _, cell in columns)] for row in self.rows]
        versions = ", ".join(f"{package} {version}" for package, version in self.about["versions"].items())
        source = f"{self.title}. `{self.about['command']}`, on {self.about['device']}; {versions}."
        table = [f"| {' | '.join(line)} |" for line in lines]
        reasons = [line for reason in self.reasons() for line in ("", reason)]
        return "\n".join([*table, "", source, *reasons]) + "\n"

    def reasons(self) -> list[str]:
        """Return a line for each setting that gave no number."""
        return [f"{row['setting']}: {row['reason']}" for row in self.rows if "reason" in row]

    def _columns(self) -> Iterator[tuple[str, Any]]:
        """Yield the names of columns, and functions from a result to its cell."""
        if any("perplexity" in row for row in self.rows):
            yield "perplexity", lambda row: _number(row.get("perplexity"), ".6g")
            yield "ratio to float", lambda row: _number(row.get("ratio"), ".5g")
            yield TIMES[0], lambda row: _number(row.get("seconds"), ".1f")
            yield TIMES[1], lambda row: _number(row.get("first_seconds"), ".1f")
        for length in dict.fromkeys(one["length"] for row in self.rows for one in row.get("needles", ())):
            yield f"found in {length}", lambda row, length=length: _found(row.get("needles"), length)
        tasks = {name: task for row in self.rows for name, task in row.get("tasks", {}).items()}
        for name, task in tasks.items():
            yield f"{name} {headline(task)[0]}", lambda row, name=name: _task(row.get("tasks", {}).get(name))
        if any(row.get("average") is not None for row in self.rows) and len(tasks) > 1:
            yield "average", lambda row: _number(row.get("average"), ".4f")
        if tasks:
            yield TIMES[2], lambda row: _number(row.get("task_seconds"), ".1f")
            yield TIMES[3], lambda row: _number(row.get("graphs"), "d")


TIMES = ("seconds", "of it first batch", "seconds of tasks", "graphs")


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _found(needles: list[dict[str, Any]] | None, length: int) -> str:
    """Return how many needles were found in texts of a length, and of how many."""
    found = [one["found"] for one in needles or () if one["length"] == length]
    return f"{sum(found)} of {len(found)}" if found else ""


def _task(task: dict[str, Any] | None) -> str:
    """Return the headline of a task with its standard error."""
    if task is None:
        return ""
    name, value = headline(task)
    stderr = task["metrics"][name]["stderr"]
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
