"""The command line: ``quarot-fx bench``, ``demo``, ``eval``, ``explain``, ``learn``, ``plot`` and ``quantize``.

Commands import torch and transformers only when they run, so that ``quarot-fx --help`` answers at once.
"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from quarot_fx.cli.bench import bench
from quarot_fx.cli.demo import demo
from quarot_fx.cli.eval import evaluate
from quarot_fx.cli.explain import explain
from quarot_fx.cli.learn import learn
from quarot_fx.cli.plot import plot
from quarot_fx.cli.quantize import quantize
from quarot_fx.errors import QuarotError


class ErrorReportingGroup(TyperGroup):
    """Commands whose users' mistakes are one line of text; only our own mistakes are tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit with status 1 after a :class:`QuarotError`."""
        try:
            return super().invoke(ctx)
        except QuarotError as error:
            Console(stderr=True).print("error:", str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=ErrorReportingGroup,
    help="Run decoder language models in 4 bits: QuaRot as graph passes behind torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("bench")(bench)
app.command("demo")(demo)
app.command("eval")(evaluate)
app.command("explain")(explain)
app.command("learn")(learn)
app.command("plot")(plot)
app.command("quantize")(quantize)
