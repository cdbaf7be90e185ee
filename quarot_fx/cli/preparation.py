"""What a setting needs before its model can be compiled: learned rotations, and weights rounded by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from quarot_fx.cli.settings import Setting


def prepare(
    model: Any, setting: Setting, tokens: Tensor | None, gptq: Mapping[str, Any], learning: Mapping[str, Any]
) -> tuple[Setting, dict[str, Any]]:
    """Return a setting as it can be compiled, and what is to be recorded of what that took.

    Args:
        model: as :func:`quarot_fx.calibrate` takes it.
        setting: by name.
        tokens: [n, length], to learn and calibrate on; may be missing if the setting needs neither.
        gptq: options of GPTQ; those of the setting overrule them.
        learning: options of learning, likewise.
    """
    import quarot_fx

    record: dict[str, Any] = {}
    if setting.learning is not None and tokens is not None:
        learns = quarot_fx.LearningOptions.from_options({**learning, **setting.learning})
        learned = quarot_fx.learn_rotations(model, tokens, learning=learns, **(setting.options or {}))
        setting = replace(setting, options={**(setting.options or {}), "learned_rotations": learned})
        record |= {"learning": asdict(learns), "learning_seconds": learned.seconds, "losses": learned.losses}
    if setting.gptq is not None and tokens is not None:
        how = quarot_fx.GPTQOptions.from_options({**gptq, **setting.gptq})
        report = quarot_fx.calibrate(model, tokens, gptq=how, **(setting.options or {}))
        record |= {"gptq": asdict(how), "calibration_seconds": report.seconds}
    return setting, record
