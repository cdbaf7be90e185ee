"""Calibration as commands ask for it: what it takes, and the setting that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarot_fx.cli.settings import Setting
from quarot_fx.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quarot_fx.calibration.report import Calibration

CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="What settings with -gptq, searched clip ratios or a budget of bits are calibrated on: a text file, "
        "'wikitext2', 'c4', ...",
    ),
]
CalibrationSamples = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
GPTQAssignments = Annotated[
    list[str] | None, typer.Option("--gptq", metavar="NAME=VALUE", help="A field of GPTQOptions: act_order=True.")
]


def check_calibration_text(text: str | None, setting: Setting) -> None:
    """Raise an OptionError if a setting takes calibration, and there is nothing to calibrate on."""
    if text is None and setting.needs_calibration:
        reason = f"{setting.name!r} needs a text to calibrate on"
        raise OptionError(name="calibration", value=None, reason=reason)


def calibrate_setting(
    model: nn.Module, setting: Setting, token_ids: Tensor, gptq: Mapping[str, Any], state: Path | None = None
) -> tuple[Setting, Calibration]:
    """Calibrate a model under a setting; return the setting with the options that were found, and the report.

    Args:
        model: in evaluation mode.
        setting: that takes calibration.
        token_ids: [n, length].
        gptq: options of GPTQ, which those of the setting overrule.
        state: a folder to save and resume in.
    """
    import quarot_fx

    how = quarot_fx.GPTQOptions.from_options({**gptq, **(setting.gptq or {})})
    options = {"w_rounding": "nearest", **(setting.options or {})}
    report = quarot_fx.calibrate(model, token_ids, gptq=how, state=state, **setting.budget, **options)
    return replace(setting, options=report.options), report


def calibration_results(report: Calibration) -> dict[str, Any]:
    """Return what a calibration found, but for the options and single weights, as JSON-able data."""
    clips = {"inputs": [asdict(one) for one in report.inputs]} if report.inputs else {}
    caches = {"caches": [asdict(one) for one in report.caches]} if report.caches else {}
    bits = {"bits_per_weight": report.bits_per_weight, "bits": [asdict(one) for one in report.bits]}
    of_budget = bits if report.bits else {}
    return {"gptq": asdict(report.gptq), **of_budget, **clips, **caches, "calibration_seconds": report.seconds}
