"""The table of operator rules: all that quarot knows about models.

A rule takes an :class:`~quarot_fx.basis.operator.Operator` and ties or pins axes. An operator without a rule is a
barrier and is reported, so a missing rule costs speed or accuracy, never correctness. To add one::

    @rule(torch.ops.aten.my_op.default)
    def my_op(op: Operator) -> None:
        op.tie(op["input"].axis(-1), op.result.axis(-1))
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from quarot_fx.basis.operator import Operator

Rule = Callable[[Operator], None]
_RULES: dict[str, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Enter a rule for the given operators into the table.

    Operators of a library that need not be loaded are given by name: ``"library.operator.overload"``.
    """

    def enter(function: Rule) -> Rule:
        _RULES.update((str(target), function) for target in targets)
        return function

    return enter


@cache
def rules() -> dict[str, Rule]:
    """Return the table: name of an operator -> its rule."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _RULES
