"""The rotation plan: which axes are rotated by what, where transforms run and why. Plain data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LEARNED = "learned-"  # what the names of learned rotations begin with


@dataclass(frozen=True)
class Transform:
    """A change of basis between a tensor and some of its uses.

    Attributes:
        node: the node whose result is transformed.
        dim: its axis.
        inner: elements of that axis that lie inside of the transformed factor (the axis is outer x order x inner).
        rotation: the orthogonal matrix, by name (``"hadamard-1536"``).
        inverse: by the transpose instead.
        uses: ``(user node, place among its argument nodes)`` that read the transformed tensor.
        online: runs whenever the model runs; otherwise a constant absorbs it.
        shape: of the tensor, symbolic sizes as text.
        where: for whom it is there, in the user's model.
        why: what makes it necessary.
        basis: which of the plan's bases it leads into, or out of.
    """

    node: str
    dim: int
    inner: int
    rotation: str
    inverse: bool
    uses: tuple[tuple[str, int], ...]
    online: bool
    shape: tuple[int | str, ...]
    where: str
    why: str
    basis: int = 0


@dataclass(frozen=True)
class Basis:
    """Axes that are all rotated by one matrix, such as those of the residual stream.

    Attributes:
        rotation: the orthogonal matrix, by name.
        is_free: any matrix would do and cost nothing: weights absorb it, and the graph does not name it. Of keys and
            values that is so also if a cache of the caller's makes some graph transform new ones online.
        of_heads: these are keys or values.
        absorbed_by: the axes of weights that absorb it, by what is the same in all graphs of a model: the parameter,
            the place of the factor, and the expression of which it is the factor.
    """

    rotation: str
    is_free: bool
    of_heads: bool
    absorbed_by: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """A linear layer's input, or keys or values, that was to be rotated.

    Attributes:
        kind: ``"linear"``, ``"key"`` or ``"value"``.
        node: the product that reads it.
        name: the weight's parameter, or the place of the attention in the user's model.
        rotated: ``"free"``, ``"online"``, ``"partly"`` or ``"no"``.
        why: why it takes an online transform, or why it is not rotated; or that the rotation was learned.
    """

    kind: str
    node: str
    name: str
    rotated: str
    why: str = ""


@dataclass(frozen=True)
class Given:
    """A transform that the graph had before, as a cache that holds rotated codes has.

    Attributes:
        node: the transform.
        rotation, inverse: what it does.
        where: for whom it is there, in the user's model.
        is_identity: the plan rotates what it reads, or keeps what it returns, so that nothing is left for it to do.
        by: what the plan rotates for that: parameters by name, tensors by ``"<node> online"``.
        why: why it stays, if it does.
    """

    node: str
    rotation: str
    inverse: bool
    where: str
    is_identity: bool
    by: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class RotationPlan:
    """All that the rotate pass needs, and all that a reader wants to know.

    Attributes:
        transforms: every change of basis, of constants too.
        sites: what became of everything that was to be rotated.
        barriers: operators without a rule, with the number of times they occur.
        cost: online transforms together, in elements x log2(order).
        given: what became of the transforms that the graph had before.
        bases: what the transforms lead into.
    """

    transforms: tuple[Transform, ...] = ()
    sites: tuple[Site, ...] = ()
    barriers: tuple[tuple[str, int], ...] = ()
    cost: float = 0.0
    given: tuple[Given, ...] = ()
    bases: tuple[Basis, ...] = ()

    @property
    def online(self) -> tuple[Transform, ...]:
        """The transforms that run whenever the model runs."""
        return tuple(transform for transform in self.transforms if transform.online)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.as_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RotationPlan:
        """Read a plan back from :meth:`as_dict`, also after a trip through JSON."""
        return cls(
            transforms=tuple(
                Transform(**{**t, "uses": tuple((u, p) for u, p in t["uses"]), "shape": tuple(t["shape"])})
                for t in data["transforms"]
            ),
            sites=tuple(Site(**site) for site in data["sites"]),
            barriers=tuple((target, count) for target, count in data["barriers"]),
            cost=data["cost"],
            given=tuple(Given(**{**given, "by": tuple(given["by"])}) for given in data["given"]),
            bases=tuple(Basis(**{**basis, "absorbed_by": tuple(basis["absorbed_by"])}) for basis in data["bases"]),
        )

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(title="online transforms", title_justify="left")
        for column in ("for", "rotation", "axis of", "count", "because"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for row, count in Counter(_row(transform) for transform in self.online).items():
            *head, why = row
            table.add_row(*head, str(count), why)
        absorbed = len(self.transforms) - len(self.online)
        lines = [f"{absorbed} transforms are absorbed by weights"]
        learned = Counter(form for basis in self.bases if (form := _learned(basis.rotation)))
        lines += [f"rotations {form} were learned ({count} of them)" for form, count in learned.items()]
        lines += [f"{line} ({count} times)" for line, count in Counter(map(_line, self.given)).items()]
        lines += [f"barrier: {target} has no rule ({count} times)" for target, count in self.barriers]
        return Group(table, *lines)


def _row(transform: Transform) -> tuple[str, str, str, str]:
    shape = "[" + ", ".join(str(size) for size in transform.shape) + f"] axis {transform.dim}"
    return _of_layers(transform.where), _named(transform), shape, _of_nodes(transform.why)


def _line(given: Given) -> str:
    instead = ", ".join(given.by) or "its neighbours"
    fate = f"is an identity, by {instead}" if given.is_identity else f"stays: {given.why}"
    return _of_nodes(_of_layers(f"{_named(given)} of {given.where} {fate}"))


def _named(transform: Transform | Given) -> str:
    return transform.rotation + (" transposed" if transform.inverse else "")


def _learned(rotation: str) -> str:
    """Return the form of a learned rotation's name, and nothing for another's."""
    return re.sub(r"[0-9a-f]+$", "*", rotation) if rotation.startswith(LEARNED) else ""


def _of_layers(text: str) -> str:
    return re.sub(r"(?<=\.)\d+\b", "*", text)


def _of_nodes(text: str) -> str:
    return re.sub(r"_\d+\b", "", text)
