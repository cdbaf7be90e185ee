"""The activations that ops apply, by name, alone or to a gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from quarot_fx.errors import UnknownOptionError


def _identity(x: Tensor) -> Tensor:
    return x


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": _identity,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def check_activation(name: str) -> None:
    """Raise :class:`UnknownOptionError` if there is no activation of that name; the nearest one is suggested."""
    if name not in ACTIVATIONS:
        raise UnknownOptionError("activation", name, ACTIVATIONS)


def activated(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """Return ``activation(gate) * x``, or ``activation(x)`` without a gate, in float32.

    Raises:
        UnknownOptionError: there is no activation of that name.
    """
    check_activation(activation)
    activate = ACTIVATIONS[activation]
    return activate(x.float()) if gate is None else activate(gate.float()) * x.float()
