"""What the passes share that put one op, which a kernel runs, in the place of several: match, validate, rewrite."""

from __future__ import annotations

import torch
from torch import fx

from quarot_fx.config import QuarotConfig
from quarot_fx.graph import Inserter, module_path
from quarot_fx.lowering.providers import choose_provider, fake_arguments
from quarot_fx.ops import declaration_of
from quarot_fx.report import PassReport


def insert_fused(
    insert: Inserter, config: QuarotConfig, report: PassReport, op: torch._ops.OpOverload, *args: object
) -> fx.Node | None:
    """Insert a call of an op where it is to be fused, or record why it is not.

    ``config.kernels`` decides: ``"auto"`` fuses what a provider runs, ``"reference"`` everything, ``"none"`` nothing.

    Returns:
        the node, or ``None`` if the nodes that it would replace are to stay.
    """
    if config.kernels == "none":
        report.decline(module_path(insert.like), "kernels='none' asks to leave the graph as it is")
        return None
    if config.kernels == "auto":
        declaration = declaration_of(op)
        assert declaration is not None, f"{op} is not declared"
        choice = choose_provider(declaration, fake_arguments(args))
        if choice.name is None:
            report.decline(module_path(insert.like), choice.reason)
            return None
    report.matched += 1
    return insert.call(op, *args)
