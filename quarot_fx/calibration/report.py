"""What became of every weight that was calibrated: as data, as JSON and as a table."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quarot_fx.calibration.options import GPTQOptions

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class CalibratedWeight:
    """What became of one matrix.

    Attributes:
        parameter: the weight's name in the user's model.
        matrix: its number in a stack of experts, or ``None``.
        inputs: elements of its input.
        tokens: rows of its input that it was calibrated on.
        damping: of its Hessian.
        error: relative change of its output over calibration data, by norm.
        nearest_error: that of rounding to nearest at the same scales.
    """

    parameter: str
    matrix: int | None
    inputs: int
    tokens: int
    damping: float
    error: float
    nearest_error: float

    @property
    def name(self) -> str:
        """The parameter, and the number of the matrix in it."""
        return self.parameter if self.matrix is None else f"{self.parameter}[{self.matrix}]"


@dataclass(frozen=True)
class Calibration:
    """All that ``quarot_fx.calibrate`` tells. The codes themselves are where graphs find them when they are compiled.

    Attributes:
        weights: in the order in which they were rounded.
        options: of GPTQ.
        sequences, length: of the calibration data.
        seconds: all that it took.
    """

    weights: tuple[CalibratedWeight, ...]
    options: GPTQOptions
    sequences: int
    length: int
    seconds: float

    @property
    def unseen(self) -> tuple[CalibratedWeight, ...]:
        """Matrices that no token reached, such as experts that were never chosen: they are rounded to nearest."""
        return tuple(weight for weight in self.weights if not weight.tokens)

    @property
    def underdetermined(self) -> tuple[CalibratedWeight, ...]:
        """Matrices that fewer tokens reached than they have inputs: GPTQ makes of these and of damping what it can."""
        return tuple(weight for weight in self.weights if 0 < weight.tokens < weight.inputs)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table(title="weights rounded by GPTQ", title_justify="left")
        table.add_column("weight", overflow="fold")
        for column in ("count", "tokens", "error of outputs", "to nearest"):
            table.add_column(column, justify="right")
        alike = defaultdict(list)
        for weight in self.weights:
            alike[re.sub(r"\b\d+\b", "*", weight.name)].append(weight)
        for name, found in alike.items():
            tokens = _span([weight.tokens for weight in found])
            errors = [
                sum(values) / len(found) for values in zip(*((w.error, w.nearest_error) for w in found), strict=True)
            ]
            table.add_row(name, str(len(found)), tokens, *(f"{error:.4f}" for error in errors))
        parts: list[RenderableType] = [table]
        if self.unseen:
            parts.append(f"no token reached these, which are rounded to nearest: {_names(self.unseen)}")
        if self.underdetermined:
            few = "fewer tokens reached these than they have inputs; damping decides the rest"
            parts.append(f"{few}: {_names(self.underdetermined)}")
        if raised := [weight for weight in self.weights if weight.damping > self.options.damping]:
            parts.append(f"damping was raised, to {_span([w.damping for w in raised])}, for: {_names(raised)}")
        parts.append(f"{self.sequences} x {self.length} tokens, {self.seconds:.1f} s")
        return Group(*parts)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _span(numbers: list[Any]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _names(weights: Any) -> str:
    return ", ".join(weight.name for weight in weights)
