"""What was done to a graph and what was not, with the reason: as data, as JSON and as a table."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quarot_fx.config import UNQUANTIZED_BITS
from quarot_fx.printed import Printed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quarot_fx.basis.plan import RotationPlan


@dataclass(frozen=True)
class Decline:
    """Something that a pass left alone."""

    where: str
    reason: str


@dataclass
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        matched: places that it rewrote.
        declined: places that it looked at and left alone, and why.
        nodes_before, nodes_after: size of the graph.
        weights: tensors that it made anew.
        seconds: how long it took.
        difference: relative difference of the output against the stage before, in float64; only with ``check=True``.
    """

    name: str
    matched: int = 0
    declined: list[Decline] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    weights: int = 0
    seconds: float = 0.0
    difference: float | None = None

    def decline(self, where: str, reason: str) -> None:
        """Record something that is left alone."""
        self.declined.append(Decline(where, reason))


@dataclass(frozen=True)
class LinearRecord:
    """What became of one linear layer.

    Attributes:
        parameter: the weight's name in the user's model.
        w_bits, a_bits: bits of the weight and of the activation that enters it; 16 if left alone.
        rotated: ``"free"``, ``"online"``, ``"partly"`` or ``"no"``.
        reason: why it is rotated online, or why it is not rotated or not quantised; or that the rotation was learned.
        role: ``"head"`` or ``"router"``, which keep their precision, or nothing.
        rounding: of the weight, ``"nearest"``, ``"gptq"`` or ``"tuned"``; empty if it is left alone.
        a_clip: ratio that the activation is clipped at; ``None`` if it is left alone.
    """

    parameter: str
    w_bits: int
    a_bits: int
    rotated: str
    reason: str = ""
    role: str = ""
    rounding: str = ""
    a_clip: float | None = None

    @property
    def bits(self) -> str:
        """Both bits in short, and the rounding where it is not to nearest: ``W4A4``, ``W4A4 gptq``."""
        rounding = f" {self.rounding}" if self.rounding not in ("", "nearest") else ""
        return f"W{self.w_bits}A{self.a_bits}{rounding}"

    @property
    def is_quantized(self) -> bool:
        """Whether both the weight and what enters it have fewer bits."""
        return max(self.w_bits, self.a_bits) < UNQUANTIZED_BITS


@dataclass(frozen=True)
class CacheRecord:
    """What became of the keys or values of one attention.

    Attributes:
        where: the attention, in the user's model.
        kind: ``"key"`` or ``"value"``.
        bits: of a code; 16 if left alone.
        rotated, reason: as of a linear layer.
        by: ``"simulation"``, at every read; ``"cache"``, one of the caller's that holds codes; or nothing.
    """

    where: str
    kind: str
    bits: int
    rotated: str
    reason: str = ""
    by: str = ""


@dataclass(frozen=True)
class OtherWeight:
    """A matrix that no linear layer and no embedding reads, and so stays as it is.

    Attributes:
        parameter: its name in the user's model.
        read_by: the operator that reads it.
    """

    parameter: str
    read_by: str


@dataclass(frozen=True)
class Coverage:
    """How much of a model was quantised and rotated. Heads and routers, which keep their precision, do not count.

    Attributes:
        linears: number of linear layers.
        quantized: of these, quantised.
        free, online: of these, rotated at no cost, or by an online transform.
        keys, values: number of reads of keys and of values.
        quantized_keys, quantized_values: of these, quantised.
        transforms: online transforms.
    """

    linears: int
    quantized: int
    free: int
    online: int
    keys: int
    quantized_keys: int
    values: int
    quantized_values: int
    transforms: int

    def __str__(self) -> str:
        return (
            f"{self.quantized} of {self.linears} linear layers quantised, {self.free + self.online} rotated "
            f"({self.free} free, {self.online} online); keys {self.quantized_keys} of {self.keys}, "
            f"values {self.quantized_values} of {self.values}; {self.transforms} online transforms"
        )


@dataclass
class Report(Printed):
    """All that ``quarot_fx.explain`` tells.

    Attributes:
        passes: one report per pass, in order.
        plan: the rotation plan, if it was made.
        linears, caches: what became of every linear layer and of all keys and values.
        others: matrices that are neither a linear layer's nor an embedding's.
        weight_bytes: bytes of the model's parameters that the graph reads, before and after.
    """

    passes: list[PassReport] = field(default_factory=list)
    plan: RotationPlan | None = None
    linears: list[LinearRecord] = field(default_factory=list)
    caches: list[CacheRecord] = field(default_factory=list)
    others: list[OtherWeight] = field(default_factory=list)
    weight_bytes: tuple[int, int] = (0, 0)

    @property
    def coverage(self) -> Coverage:
        """How much was quantised and rotated."""
        linears = [record for record in self.linears if not record.role]
        bits = {kind: [r.bits for r in self.caches if r.kind == kind] for kind in ("key", "value")}
        quantized = {kind: sum(b < UNQUANTIZED_BITS for b in found) for kind, found in bits.items()}
        return Coverage(
            linears=len(linears),
            quantized=sum(record.is_quantized for record in linears),
            free=sum(record.rotated == "free" for record in linears),
            online=sum(record.rotated == "online" for record in linears),
            keys=len(bits["key"]),
            quantized_keys=quantized["key"],
            values=len(bits["value"]),
            quantized_values=quantized["value"],
            transforms=len(self.plan.online) if self.plan else 0,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return {
            "passes": [asdict(report) for report in self.passes],
            "plan": self.plan.as_dict() if self.plan else None,
            "linears": [asdict(record) for record in self.linears],
            "caches": [asdict(record) for record in self.caches],
            "others": [asdict(record) for record in self.others],
            "coverage": asdict(self.coverage),
            "weight_bytes": list(self.weight_bytes),
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        parts: list[RenderableType] = [_passes_table(self.passes), *_declines(self.passes)]
        if self.plan:
            parts.append(self.plan.__rich__())
        if self.linears or self.caches:
            parts.append(_coverage_table(self.linears, self.caches))
        parts += [f"{other.parameter} stays as it is: {other.read_by} reads it" for other in self.others]
        if self.plan:
            parts.append(str(self.coverage))
        before, after = self.weight_bytes
        if before:
            parts.append(
                f"weights: {before / 2**20:,.1f} MiB -> {after / 2**20:,.1f} MiB ({before / max(after, 1):.2f}x)"
            )
        return Group(*parts)


def _passes_table(reports: list[PassReport]) -> Any:
    from rich.table import Table

    table = Table(title="passes", title_justify="left")
    table.add_column("pass", no_wrap=True)
    for column in ("matched", "declined", "nodes", "weights", "seconds", "difference"):
        table.add_column(column, justify="right")
    for report in reports:
        difference = "" if report.difference is None else f"{report.difference:.1e}"
        table.add_row(
            report.name,
            str(report.matched),
            str(len(report.declined)),
            f"{report.nodes_before} -> {report.nodes_after}",
            str(report.weights),
            f"{report.seconds:.2f}",
            difference,
        )
    return table


def _declines(reports: list[PassReport]) -> list[str]:
    """Say what was left alone and why, a line for each reason of each pass."""
    reasons = Counter((r.name, without_index(d.reason)) for r in reports for d in r.declined)
    return [f"{name} declined {count} x: {reason}" for (name, reason), count in reasons.items()]


def _coverage_table(linears: list[LinearRecord], caches: list[CacheRecord]) -> Any:
    from rich.table import Table

    table = Table(title="linear layers and caches", title_justify="left")
    for column in ("what", "bits", "rotated", "count", "because"):
        table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    rows = Counter(
        [(without_index(r.parameter), r.bits, r.rotated, without_index(r.reason)) for r in linears]
        + [(_cache(r), f"KV{r.bits}", r.rotated, without_index(r.reason)) for r in caches]
    )
    for (what, bits, rotated, reason), count in rows.items():
        table.add_row(what, bits, rotated, str(count), reason)
    return table


def _cache(record: CacheRecord) -> str:
    by = {"simulation": ", quantised when read", "cache": ", quantised by the cache", "": ""}
    return f"{record.kind}s{by[record.by]}"


def without_index(text: str) -> str:
    """Name what is the same in every layer: ``layers.3.up.weight`` -> ``layers.*.up.weight``, ``mul_17`` -> ``mul``."""
    return re.sub(r"(?<=\w)_\d+\b", "", re.sub(r"(?<=\.)\d+\b", "*", text))
