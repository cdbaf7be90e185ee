"""Every op is given to the first provider that runs it on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quarot_fx.graph import Constants, module_path
from quarot_fx.lowering.providers import choose_provider, fake_arguments
from quarot_fx.ops import declaration_of
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport


@dataclass(frozen=True)
class LowerOps(Pass):
    """``quarot::op -> quarot_<provider>::op``. An op that no provider takes keeps its reference; what is computed once
    has no need of a kernel.
    """

    requires: ClassVar[tuple[str, ...]] = (
        "fuse-int-linears",
        "fuse-float-linears",
        "fuse-gates",
        "merge-int-linears",
        "fuse-norms",
        "fuse-norm-linears",
        "fuse-rotations",
        "fuse-ropes",
        "fuse-attention",
        "fuse-packed-attention",
        "fuse-appends",
        "pair-appends",
    )
    tolerance: ClassVar[float | None] = None  # kernels compute in float32 at most

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for node in program.graph.nodes:
            declaration = declaration_of(node.target)
            if declaration is None or node in constants or self.config.kernels == "none":
                continue
            where, runs = module_path(node), f"quarot::{declaration.name} runs as its reference"
            if node.kwargs:
                report.decline(where, f"{runs}: it is called with keyword arguments")
                continue
            arguments = fake_arguments(node.args)
            choice = choose_provider(declaration, arguments)
            if choice.provider is None:
                report.decline(where, f"{runs}: {choice.reason}")
                continue
            node.target = declaration.overload_of(str(choice.name))
            if choice.provider.prepare is not None:
                choice.provider.prepare(*arguments)
            report.matched += 1
