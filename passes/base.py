"""The contract of a pass: a frozen dataclass with a name, that takes a program and returns a new one with a report."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from quarot_fx.config import QuarotConfig
from quarot_fx.program import Program, drop_unused_tensors
from quarot_fx.report import PassReport

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Pass(ABC):
    """A graph pass.

    Use one alone on any FX graph, ``FoldGains()(graph_module)``, or put it in a pipeline.

    Attributes:
        config: options; a pass reads those that concern it.
        requires: names of passes that must run earlier in a pipeline, if they are in it at all.
        tolerance: how much the output may change, relative and in float64; None where changing it is the point.
    """

    config: QuarotConfig = field(default_factory=QuarotConfig)
    requires: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float | None] = 1e-9  # rounding of a few thousand terms stays well below

    @property
    def name(self) -> str:
        """The name in pipelines and reports: the class name in kebab case."""
        return pass_name(type(self))

    @abstractmethod
    def run(self, program: Program, report: PassReport) -> None:
        """Rewrite a program in place, and say in the report what matched and what was declined."""

    def __call__(self, state: Program | fx.GraphModule | ExportedProgram, *inputs: Any) -> Program:
        """Return a rewritten copy; ``state`` stays as it is.

        Args:
            state: a program, an exported program, or a graph module of any origin.
            inputs: example inputs, where the graph has no fake values.
        """
        program = Program.of(state, *inputs)
        self.apply(program)
        return program

    def apply(self, program: Program) -> PassReport:
        """Rewrite a program in place, tidy its graph, and append the report."""
        report = PassReport(self.name, nodes_before=len(program.graph.nodes))
        start = time.perf_counter()
        self.run(program, report)
        program.graph.eliminate_dead_code()
        program.graph.lint()
        drop_unused_tensors(program.graph_module)
        program.graph_module.recompile()
        report.seconds = time.perf_counter() - start
        report.nodes_after = len(program.graph.nodes)
        program.reports.append(report)
        return report


def pass_name(cls: type[Pass]) -> str:
    """Return ``"fold-gains"`` for ``FoldGains``."""
    return re.sub(r"(?<!^)(?=[A-Z][a-z])", "-", cls.__name__).lower()
