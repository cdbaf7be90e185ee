"""Packages that only an extra of quarot-fx installs."""

from __future__ import annotations

import importlib
from typing import Any

from quarot_fx.errors import MissingExtraError


def import_extra(module: str, extra: str) -> Any:
    """Import a module that only an extra installs.

    Raises:
        MissingExtraError: it is not installed; the message says which extra has it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(package=module.partition(".")[0], extra=extra) from error
