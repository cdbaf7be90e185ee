"""The kernel of ``append`` for the keys and the values of a layer together: one launch instead of two."""

from __future__ import annotations

from typing import Any

from quarot_fx.lowering.triton.append import launch_appends
from quarot_fx.lowering.triton.appended import Appended
from quarot_fx.ops.append_pair import arguments_of_each


def append_pair(*args: Any) -> None:
    """Do what the op declares."""
    keys, values = arguments_of_each(*args)
    launch_appends(Appended(*keys), Appended(*values))
