"""quarot_fx: ``torch.compile(model, backend="quarot")`` makes a decoder language model run in 4 bits.

Importing this module loads neither Triton nor transformers, and torch only when something of it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "QuarotConfig": "quarot_fx.config",
    "QuantScheme": "quarot_fx.config",
    "rewrite": "quarot_fx.inspection",
    "explain": "quarot_fx.inspection",
    "learn_rotations": "quarot_fx.learning.learn",
    "LearningOptions": "quarot_fx.learning.options",
    "LearnedRotations": "quarot_fx.learning.rotations",
    "tune_scales": "quarot_fx.learning.tune",
    "TuningOptions": "quarot_fx.learning.options",
    "TunedScales": "quarot_fx.learning.tuned",
    "calibrate": "quarot_fx.calibration.calibrate",
    "GPTQOptions": "quarot_fx.calibration.options",
    "KeyBalances": "quarot_fx.balance",
    "Calibration": "quarot_fx.calibration.report",
    "sqnr": "quarot_fx.quantization_error",
    "SQNRReport": "quarot_fx.quantization_error",
    "absorb_rotations": "quarot_fx.checkpoint.absorbing",
    "save": "quarot_fx.checkpoint.saving",
    "load": "quarot_fx.checkpoint.loading",
    "Report": "quarot_fx.report",
    "Program": "quarot_fx.program",
    "RotationPlan": "quarot_fx.basis.plan",
    "Rotation": "quarot_fx.rotation",
    "Pass": "quarot_fx.passes.base",
    "QuarotCache": "quarot_fx.cache.quarot_cache",
    "generation_cache": "quarot_fx.cache.generation",
    "QuarotError": "quarot_fx.errors",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'quarot_fx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
