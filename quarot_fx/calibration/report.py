"""What calibration found for every weight and every input: as data, as JSON and as a table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.printed import Printed

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

T = TypeVar("T")


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
class CalibratedInput:
    """How the input of some layers is clipped.

    Attributes:
        parameters: names of the layers' weights in the user's model.
        clip: the ratio.
        error: relative change of the layers' outputs over calibration data, by norm, by quantising the input so.
        unclipped_error: that of quantising it without clipping.
    """

    parameters: tuple[str, ...]
    clip: float
    error: float
    unclipped_error: float


@dataclass(frozen=True)
class CalibratedCaches:
    """How keys or values are clipped.

    Attributes:
        kind: ``"key"`` or ``"value"``.
        clip: the ratio.
        error: relative change of keys or values by quantising them so, by norm, the mean square of all.
        unclipped_error: that of quantising them without clipping.
    """

    kind: str
    clip: float
    error: float
    unclipped_error: float


@dataclass(frozen=True)
class BalancedKeys:
    """How well the keys of one layer are balanced.

    Attributes:
        where: the attention in the user's model.
        noise: of scores that is to be expected by quantising keys, against that without balancing, the mean of heads.
    """

    where: str
    noise: float


@dataclass(frozen=True)
class BitsChoice:
    """What a number of bits for some layers costs.

    Attributes:
        bits: of a code.
        divergence: mean Kullback-Leibler divergence of the model's predictions, in nats, if only the weights of these
            layers are quantised, to nearest.
        bytes: of their codes, scales and zero points.
    """

    bits: int
    divergence: float
    bytes: int


@dataclass(frozen=True)
class ChosenBits:
    """How many bits some layers got.

    Attributes:
        parameters: names of their weights in the user's model.
        bits: of a code.
        weights: number of their weights.
        choices: all that there was to choose from.
    """

    parameters: tuple[str, ...]
    bits: int
    weights: int
    choices: tuple[BitsChoice, ...]

    @property
    def chosen(self) -> BitsChoice:
        """What these bits cost."""
        return next(one for one in self.choices if one.bits == self.bits)


@dataclass(frozen=True)
class Calibration(Printed):
    """All that ``quarot_fx.calibrate`` found. The codes themselves are where graphs find them when they are compiled.

    Attributes:
        options: for the backend, and for ``quarot_fx.save``, as JSON-able data: those of weights that calibration was
            called with, and the clip ratios and bits that it found, as overrides.
        weights: in the order in which they were rounded.
        inputs: whose clip ratios were searched for.
        caches: likewise.
        keys: of layers whose keys are balanced, if they are.
        bits: of layers that share a budget, if there was one.
        gptq: options of GPTQ.
        sequences, length: of the calibration data.
        seconds: all that it took.
    """

    options: dict[str, Any]
    weights: tuple[CalibratedWeight, ...]
    inputs: tuple[CalibratedInput, ...]
    caches: tuple[CalibratedCaches, ...]
    keys: tuple[BalancedKeys, ...]
    bits: tuple[ChosenBits, ...]
    gptq: GPTQOptions
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

    @property
    def bits_per_weight(self) -> float | None:
        """Average over all layers that share the budget, with scales and zero points."""
        size, weights = sum(one.chosen.bytes for one in self.bits), sum(one.weights for one in self.bits)
        return 8 * size / weights if weights else None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        parts: list[RenderableType] = []
        if self.bits:
            parts.append(self._table_of_bits())
        if self.weights:
            parts.append(self._table_of_weights())
        if self.inputs or self.caches:
            parts.append(self._table_of_clips())
        if self.keys:
            parts.append(self._table_of_balances())
        if self.unseen:
            parts.append(f"no token reached these, which are rounded to nearest: {_names(self.unseen)}")
        if self.underdetermined:
            few = "fewer tokens reached these than they have inputs; damping decides the rest"
            parts.append(f"{few}: {_names(self.underdetermined)}")
        if raised := [weight for weight in self.weights if weight.damping > self.gptq.damping]:
            parts.append(f"damping was raised, to {_span([w.damping for w in raised])}, for: {_names(raised)}")
        parts.append(f"{self.sequences} x {self.length} tokens, {self.seconds:.1f} s")
        return Group(*parts)

    def _table_of_bits(self) -> Table:
        title = f"bits of layers, {self.bits_per_weight:.4f} a weight with scales"
        table = _table(title, "layers", "bits", "divergence if alone", "bytes")
        for one in self.bits:
            divergence, size = f"{one.chosen.divergence:.2g}", f"{one.chosen.bytes:,}"
            table.add_row(", ".join(one.parameters), str(len(one.parameters)), str(one.bits), divergence, size)
        return table

    def _table_of_weights(self) -> Table:
        table = _table("weights rounded on calibration data", "weight", "tokens", "error of outputs", "to nearest")
        for name, found in _alike(self.weights, lambda weight: weight.name).items():
            tokens = _span([weight.tokens for weight in found])
            errors = _mean([weight.error for weight in found]), _mean([weight.nearest_error for weight in found])
            table.add_row(name, str(len(found)), tokens, *errors)
        return table

    def _table_of_clips(self) -> Table:
        table = _table("clip ratios found on calibration data", "input of", "ratio", "error of outputs", "not clipped")
        for name, found in _alike(self.inputs, lambda one: ", ".join(one.parameters)).items():
            errors = _mean([one.error for one in found]), _mean([one.unclipped_error for one in found])
            table.add_row(name, str(len(found)), _span([one.clip for one in found]), *errors)
        for one in self.caches:
            errors = f"{one.error:.4f}", f"{one.unclipped_error:.4f}"
            table.add_row(f"attention, {one.kind}s: of themselves", "all", f"{one.clip:,}", *errors)
        return table

    def _table_of_balances(self) -> Table:
        table = _table("keys balanced on calibration data", "attention", "noise of scores, against that without")
        for name, found in _alike(self.keys, lambda one: one.where).items():
            table.add_row(name, str(len(found)), _mean([one.noise for one in found]))
        return table


def _table(title: str, what: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(what, overflow="fold")
    for column in ("count", *columns):
        table.add_column(column, justify="right")
    return table


def _alike(records: Sequence[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    """Return what differs by a number in its name only, under one name."""
    alike = defaultdict(list)
    for record in records:
        alike[re.sub(r"\b\d+\b", "*", name(record))].append(record)
    return alike


def _mean(errors: list[float]) -> str:
    return f"{sum(errors) / len(errors):.4f}"


def _span(numbers: list[Any]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _names(weights: Any) -> str:
    return ", ".join(weight.name for weight in weights)
