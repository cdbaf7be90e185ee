"""Learned rotations: which matrix is for which weights, and where the backend looks a set of them up."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_fx.printed import Printed

if TYPE_CHECKING:  # options name this module, and reading options loads no torch
    from rich.console import RenderableType

    from quarot_fx.rotation import Rotation


@dataclass(frozen=True)
class LearnedRotation:
    """A matrix, and what it was learned for.

    Attributes:
        rotation: the matrix, by name.
        absorbed_by: the axes of weights that absorb it, as a :class:`~quarot_fx.basis.plan.Basis` has them.
    """

    rotation: Rotation
    absorbed_by: tuple[str, ...]


class LearnedRotations(Printed):
    """A set of learned rotations, for ``torch.compile(model, backend="quarot", options={"learned_rotations": ...})``.

    Sets with the same matrices for the same weights are equal.

    Args:
        rotations: each for other weights.
        options: that they were learned with, as data.
        losses: in each step, in nats per token.
        seconds: that it took.

    Attributes:
        name: that the process knows the set by, of its content.
        rotations, options, losses, seconds: as given.
    """

    def __init__(
        self,
        rotations: Iterable[LearnedRotation],
        options: dict[str, Any] | None = None,
        losses: Sequence[float] = (),
        seconds: float = 0.0,
    ) -> None:
        self.rotations = tuple(rotations)
        self.options, self.losses, self.seconds = options or {}, tuple(losses), seconds
        content = json.dumps([(str(one.rotation), one.absorbed_by) for one in self.rotations])
        self.name = f"learned-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self._of = {absorber: str(one.rotation) for one in self.rotations for absorber in one.absorbed_by}
        _KNOWN[self.name] = self

    def find(self, absorbed_by: Iterable[str]) -> str | None:
        """Return the name of the rotation that was learned for some axes of weights, if there is exactly one."""
        found = {self._of[absorber] for absorber in absorbed_by if absorber in self._of}
        return found.pop() if len(found) == 1 else None

    def save(self, folder: str | Path) -> None:
        """Write the set to a folder, which is made if it is not there: matrices as safetensors, all else as JSON."""
        from quarot_fx.learning.storage import write_rotations

        write_rotations(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> LearnedRotations:
        """Return the set that a folder holds.

        Raises:
            LearnedRotationsFileError: it holds none, or not what was written.
            NotOrthogonalError: a matrix is no rotation.
        """
        from quarot_fx.learning.storage import read_rotations

        return read_rotations(Path(folder))

    def __iter__(self) -> Iterator[LearnedRotation]:
        return iter(self.rotations)

    def __len__(self) -> int:
        return len(self.rotations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearnedRotations) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<{len(self)} rotations {self.name}>"

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table(title="learned rotations", title_justify="left")
        for column in ("rotation", "count", "absorbed by", "and others"):
            table.add_column(column, justify="right" if column in ("count", "and others") else "left", overflow="fold")
        for (rotation, first, others), count in Counter(_row(one) for one in self).items():
            table.add_row(rotation, str(count), first, others)
        parts: list[RenderableType] = [table]
        if self.losses:
            before, after = (sum(part) / len(part) for part in (self.losses[:AVERAGED], self.losses[-AVERAGED:]))
            steps = f"{len(self.losses)} steps, {self.seconds:.1f} s"
            parts.append(f"{self.options['loss']} {before:.4f} -> {after:.4f} nats a token, in {steps}")
        return Group(*parts)


def _row(one: LearnedRotation) -> tuple[str, str, str]:
    """Return what is alike for all layers."""
    first = re.sub(r"\b\d+\b", "*", one.absorbed_by[0].partition(" axis ")[0])
    return f"learned-{one.rotation.order}-*", first, str(len(one.absorbed_by) - 1)


AVERAGED = 10  # steps whose losses are averaged for the report: each has other data

_KNOWN: dict[str, LearnedRotations] = {}  # by name, as long as the process lives: options hold no more than that


def known_rotations(source: LearnedRotations | Path | str) -> LearnedRotations:
    """Return a set: as given, known by its name, or that of a folder.

    Raises:
        LearnedRotationsFileError: the folder holds none.
    """
    if isinstance(source, LearnedRotations):
        return source
    return _KNOWN.get(str(source)) or LearnedRotations.load(source)


def name_of(source: LearnedRotations | Path | str) -> str:
    """Return the name of a set: as given, known by its name, or that of a folder.

    Raises:
        LearnedRotationsFileError: the folder holds none.
    """
    return known_rotations(source).name
