"""Which implementation runs an op on a device: the first provider that takes its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch.fx.node import map_aggregate

from quarot_fx.graph import value
from quarot_fx.ops import OpDeclaration, Provider

OURS = ("triton", "aten")  # packages here that add providers as they are imported, in order of preference


@dataclass(frozen=True)
class Choice:
    """What was found for one call of an op.

    Attributes:
        name: of the provider, or ``None``.
        provider: the provider itself.
        reason: why there is none, each provider's own words.
    """

    name: str | None
    provider: Provider | None
    reason: str


def choose_provider(declaration: OpDeclaration, arguments: Sequence[Any]) -> Choice:
    """Return the first provider that takes the arguments, fake values among them; others' come before ours."""
    for name in OURS:
        import_module(f"quarot_fx.lowering.{name}")
    reasons = []
    for name, provider in sorted(declaration.providers.items(), key=_preference):
        reason = provider.reason_against(*arguments)
        if reason is None:
            return Choice(name, provider, "")
        reasons.append(f"{name}: {reason}")
    return Choice(None, None, "; ".join(reasons) or f"no provider implements quarot::{declaration.name}")


def _preference(item: tuple[str, Provider]) -> int:
    return OURS.index(item[0]) if item[0] in OURS else -1


def fake_arguments(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return a node's arguments with the fake values of the nodes among them."""
    return map_aggregate(tuple(arguments), value)
