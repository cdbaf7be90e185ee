"""The options of GPTQ, as one frozen dataclass. With ``act_order=False, sweeps=0`` it is QuaRot's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quarot_fx.errors import OptionError
from quarot_fx.option_checks import check_choice, check_flag, check_integer, from_mapping

GROUP_SCALES = ("dynamic", "static")
TARGETS = ("layer", "model")


@dataclass(frozen=True)
class GPTQOptions:
    """How weights are rounded by GPTQ.

    Attributes:
        block_size: columns whose errors are passed on to all later columns at once. Changes speed, not results, except
            with dynamic scales of groups.
        damping: what is added to the Hessian's diagonal, as a fraction of its mean.
        max_damping: damping is multiplied by 10, up to this, where a Hessian needs more of it; ``None`` makes that an
            error.
        act_order: columns whose inputs are largest are rounded first.
        sweeps: how often each code, and then each scale, is made the best one beside all others after that; 0 is GPTQ
            as published.
        group_scales: of groups, where ``w_group`` asks for these: ``"dynamic"``, found when the first column of the
            group is reached, from weights that make up for the errors of all blocks before; or ``"static"``, from the
            weight as it was.
        quantized_inputs: Hessians of activations, keys and values that are quantised as they will be at run time.
        target: what a layer is to compute: ``"layer"``, what its float weight makes of the inputs that reach it; or
            ``"model"``, what it computes in the float model, so that it also makes up for the errors of the layers
            before (GPTAQ, Li et al. 2025; Qronos, Zhang et al. 2025). The latter runs both models side by side.
            Experts are always fitted to ``"layer"``: each of the two models sends them tokens of its own choice.

    Raises:
        OptionError: a value is out of range.
        UnknownOptionError: a choice that there is not.
    """

    block_size: int = 128
    damping: float = 0.01
    max_damping: float | None = None
    act_order: bool = True
    sweeps: int = 4
    group_scales: str = "dynamic"
    quantized_inputs: bool = False
    target: str = "layer"

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, 1)
        check_integer("sweeps", self.sweeps, 0)
        for name in ("damping", "max_damping"):
            _check_damping(name, getattr(self, name))
        for name in ("act_order", "quantized_inputs"):
            check_flag(name, getattr(self, name))
        for name, known in (("group_scales", GROUP_SCALES), ("target", TARGETS)):
            check_choice(name, getattr(self, name), known)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> GPTQOptions:
        """Build options from a mapping.

        Raises:
            UnknownOptionError: a name is not an option; the nearest one is suggested.
        """
        return from_mapping(cls, "option of GPTQ", options)


def _check_damping(name: str, damping: Any) -> None:
    if name == "max_damping" and damping is None:
        return
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise OptionError(name=name, value=damping, reason="must be a finite number, 0 or more")
