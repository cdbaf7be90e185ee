"""The command line, as tests run it."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from quarot_fx.cli import app


def run(*arguments: Any, exit_code: int = 0) -> str:
    """Run ``quarot-fx``, and return what it printed; it has to end with an exit code."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.output
