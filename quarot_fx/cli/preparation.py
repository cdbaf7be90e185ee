"""What a setting takes before a model is compiled under it: learned rotations, calibration, and tuned scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_fx.calibration.data import calibration_tokens
from quarot_fx.cli.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quarot_fx.calibration.report import Calibration
    from quarot_fx.learning.rotations import LearnedRotations
    from quarot_fx.learning.tuned import TunedScales


@dataclass(frozen=True)
class CalibrationWindows:
    """What settings are calibrated on, and how.

    Attributes:
        name: of the text.
        token_ids: int64 [samples, length], that weights and clip ratios are calibrated on.
        learning_ids: likewise, that rotations are learned and scales tuned on.
        gptq: options of GPTQ, which those of a setting overrule.
        learning: options of learning, likewise.
        tuning: options of tuning, likewise.
    """

    name: str
    token_ids: Tensor
    learning_ids: Tensor
    gptq: Mapping[str, Any]
    learning: Mapping[str, Any]
    tuning: Mapping[str, Any]

    @classmethod
    def of_text(
        cls,
        name: str,
        tokenizer: Any,
        samples: int,
        learning_samples: int,
        length: int,
        seed: int,
        *how: Mapping[str, Any],
    ) -> CalibrationWindows:
        """Draw windows of a text; ``how`` are the options of GPTQ, of learning and of tuning.

        Raises:
            CalibrationDataError: the text has too few windows.
            NotFoundError: there is no such text.
            MissingExtraError: a dataset was asked for and ``datasets`` is not installed.
        """
        draw = partial(calibration_tokens, name, tokenizer, length=length, seed=seed)
        token_ids = draw(samples)
        return cls(name, token_ids, token_ids if learning_samples == samples else draw(learning_samples), *how)

    @property
    def about(self) -> dict[str, Any]:
        """What settings are calibrated on, for JSON."""
        counts = {"samples": len(self.token_ids), "learning_samples": len(self.learning_ids)}
        return {"calibration": {"text": self.name, **counts}}


MATRICES = ("learned_rotations", "key_balance")  # options that are names of what only this process knows


@dataclass(frozen=True)
class Prepared:
    """A setting with the options that were found, and reports of how."""

    setting: Setting
    learned: LearnedRotations | None
    calibration: Calibration | None
    tuned: TunedScales | None

    def results(self) -> dict[str, Any]:
        """Return what was found, but for matrices and single weights, as JSON-able data."""
        options = {name: value for name, value in (self.setting.options or {}).items() if name not in MATRICES}
        results: dict[str, Any] = {"options": options}
        if (learned := self.learned) is not None:
            results |= {"learning": learned.options, "learning_seconds": learned.seconds, "losses": learned.losses}
        if (report := self.calibration) is not None:
            results |= {"gptq": asdict(report.gptq), "calibration_seconds": report.seconds}
            if report.bits:
                results |= {"bits_per_weight": report.bits_per_weight, "bits": [asdict(one) for one in report.bits]}
            for name in ("inputs", "caches", "keys"):
                if found := getattr(report, name):
                    results[name] = [asdict(one) for one in found]
        if (tuned := self.tuned) is not None:
            results |= {"tuning": asdict(tuned.tuning), "tuning_seconds": tuned.seconds, "held_out": tuned.held_out}
        return results


def prepare(model: nn.Module, setting: Setting, data: CalibrationWindows, state: Path | None = None) -> Prepared:
    """Learn rotations for a model, if the setting says so, calibrate what it leaves to calibration, and tune scales, if
    it says so.

    Args:
        model: in evaluation mode.
        setting: that needs calibration.
        data: what it is calibrated on.
        state: a folder to save calibration in, and to resume it from.
    """
    import quarot_fx
    from quarot_fx.config import QuarotConfig

    learned = report = tuned = None
    if setting.learning is not None:
        how = quarot_fx.LearningOptions.from_options({**data.learning, **setting.learning})
        learned = quarot_fx.learn_rotations(model, data.learning_ids, learning=how, **(setting.options or {}))
        setting = replace(setting, options={**(setting.options or {}), "learned_rotations": learned})
    if setting.budget or QuarotConfig.from_options(setting.options).needs_calibration:
        rounds = quarot_fx.GPTQOptions.from_options({**data.gptq, **(setting.gptq or {})})
        options = {"w_rounding": "nearest", **(setting.options or {})}
        report = quarot_fx.calibrate(model, data.token_ids, gptq=rounds, state=state, **setting.budget, **options)
        setting = replace(setting, options=report.options)
    if setting.tuning is not None:
        steps = quarot_fx.TuningOptions.from_options({**data.tuning, **setting.tuning})
        tuned = quarot_fx.tune_scales(model, data.learning_ids, tuning=steps, **(setting.options or {}))
        setting = replace(setting, options=tuned.options)
    return Prepared(setting, learned, report, tuned)
