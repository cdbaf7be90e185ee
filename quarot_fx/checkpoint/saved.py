"""Values that a checkpoint holds, found by how they were made, as long as the parameters are those that it was loaded
with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from quarot_fx.checkpoint.damage import damaged
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import NotInCheckpointError
from quarot_fx.store import Expression, expression, version

How = tuple[str, ...]
"""An expression of named parameters, as :meth:`quarot_fx.store.Expression.text` writes it."""


@dataclass(frozen=True)
class SavedValues:
    """What one checkpoint holds.

    Attributes:
        folder: where it is, for messages.
        config: that it was made with.
        readers: how a value was made -> a function of a device that reads the value: a tensor, or the three results of
            ``quarot::quantize_weight``.
    """

    folder: str
    config: QuarotConfig
    readers: Mapping[How, Callable[[torch.device], Any]]


@dataclass(frozen=True)
class _Origin:
    name: str
    version: tuple[int, int]
    values: SavedValues


_ORIGINS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter or buffer -> where it was loaded from


def remember(tensor: torch.Tensor, name: str, values: SavedValues) -> None:
    """Let what is made of a model's parameter be looked up in the checkpoint that the parameter was loaded from."""
    _ORIGINS[tensor] = _Origin(name, version(tensor), values)


def origin_of(tensor: torch.Tensor) -> SavedValues | None:
    """Return the values of the checkpoint that a parameter was loaded from and still stands for."""
    origin = _ORIGINS.get(tensor)
    return origin.values if origin is not None and origin.version == version(tensor) else None


def saved_value(node: fx.Node) -> Any | None:
    """Return the value of a constant node as a checkpoint has it, or ``None`` if none does."""
    if not _ORIGINS:
        return None
    found = _look_up(expression(node))
    if found is None:
        return None
    values, how = found
    if how not in values.readers:
        return None
    expected = node.meta["val"]
    value = values.readers[how]((expected if isinstance(expected, torch.Tensor) else expected[0]).device)
    if _layout(value) != _layout(expected):
        reason = f"{'; '.join(how)} is {_layout(value)} there, and has to be {_layout(expected)}"
        raise damaged(values.folder, reason)
    return value


def missing_value(node: fx.Node) -> NotInCheckpointError | None:
    """Return the error that tells what a checkpoint lacks, for a node that cannot be computed without it."""
    found = _look_up(expression(node))
    if found is None:
        return None
    values, how = found
    names = [_ORIGINS[leaf].name for leaf in expression(node).leaves]
    held = ["; ".join(other) for other in values.readers if all(name in "; ".join(other) for name in names)]
    return NotInCheckpointError(
        folder=values.folder,
        parameter=names[0],
        wanted="; ".join(how),
        held=" or ".join(held) or "nothing",
        options=values.config.as_options(),
    )


def _look_up(made: Expression) -> tuple[SavedValues, How] | None:
    origins = [_ORIGINS.get(leaf) for leaf in made.leaves]
    if not origins or any(
        origin is None or origin.version != version(leaf) or origin.values is not origins[0].values
        for origin, leaf in zip(origins, made.leaves, strict=True)
    ):
        return None
    return origins[0].values, made.text([origin.name for origin in origins])


def _layout(value: Any) -> list[Any]:
    tensors = [value] if isinstance(value, torch.Tensor) else value
    return [(one.dtype, *one.shape) for one in tensors]
