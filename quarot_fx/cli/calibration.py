"""What commands that calibrate are told about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.cli.settings import Setting, parse_options
from quarot_fx.errors import OptionError
from quarot_fx.learning.options import LearningOptions, TuningOptions

CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="What settings with -gptq, -learned, -tuned, searched clip ratios or a budget of bits are calibrated on: "
        "a text file, 'wikitext2', 'c4', ...",
    ),
]
CalibrationSamples = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
LearningSamples = Annotated[
    int | None,
    typer.Option(min=1, help="Windows that rotations are learned and scales tuned on, if not all calibration windows."),
]
GPTQAssignments = Annotated[
    list[str] | None, typer.Option("--gptq", metavar="NAME=VALUE", help="A field of GPTQOptions: act_order=True.")
]
LearningAssignments = Annotated[
    list[str] | None, typer.Option("--learning", metavar="NAME=VALUE", help="A field of LearningOptions: steps=200.")
]
TuningAssignments = Annotated[
    list[str] | None, typer.Option("--tuning", metavar="NAME=VALUE", help="A field of TuningOptions: steps=300.")
]


def parse_methods(
    gptq: Iterable[str] | None, learning: Iterable[str] | None, tuning: Iterable[str] | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read the options of GPTQ, of learning and of tuning."""
    return (
        parse_options(gptq, GPTQOptions),
        parse_options(learning, LearningOptions),
        parse_options(tuning, TuningOptions),
    )


def check_calibration_text(text: str | None, setting: Setting) -> None:
    """Raise an OptionError if a setting takes calibration, and there is nothing to calibrate on."""
    if text is None and setting.needs_calibration:
        reason = f"{setting.name!r} needs a text to calibrate on"
        raise OptionError(name="calibration", value=None, reason=reason)
