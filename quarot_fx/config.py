"""All options of quarot, as one frozen dataclass. Defaults are the paper's settings (QuaRot, section 5), for 4 bits."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_fx.errors import OptionError, UnknownOptionError
from quarot_fx.option_checks import check_choice, check_flag, check_integer, from_mapping

if TYPE_CHECKING:
    from quarot_fx.balance import KeyBalances
    from quarot_fx.learning.rotations import LearnedRotations

UNQUANTIZED_BITS = 16
SEARCH = "search"
ROTATIONS = ("hadamard", "random", "none")
KERNELS = ("auto", "reference", "none")
ROUNDINGS = ("nearest", "gptq", "tuned")
# How clip ratios are searched for: by the error of the tensor itself, or by that of the outputs of layers.
SEARCHED_CLIPS = {
    "w_clip": ("search", "output"),
    "a_clip": ("output",),
    **dict.fromkeys(("k_clip", "v_clip", "kv_clip"), ("search",)),
}
# Clip ratios up to a number of bits, where none is given; with more bits nothing is clipped. Those of 4 bits are the
# paper's: the finer the steps are, the less is gained by making them finer still, and what is cut off stays lost.
DEFAULT_CLIPS: Mapping[str, Mapping[int, float]] = {
    "a_clip": {5: 0.9, 7: 0.95},
    "k_clip": {5: 0.95},
    "v_clip": {5: 0.95},
}
CALIBRATED: Mapping[str, tuple[str, ...]] = {
    "w_rounding": ("gptq", "tuned"),
    "w_clip": ("output",),
    "a_clip": ("output",),
    "k_clip": ("search",),
    "v_clip": ("search",),
    "key_balance": (SEARCH,),
}  # the values of options that take data to become numbers
OVERRIDABLE = ("w_bits", "a_bits", "w_group", "a_group", "w_sym", "a_sym", "w_clip", "a_clip", "w_rounding")
# Options that change no weight: how the graph runs, and what becomes of what it was made of.
OF_THE_RUN = ("nested_backend", "mode", "kernels", "check", "free_originals")
SKIP: Mapping[str, Any] = {"w_bits": UNQUANTIZED_BITS, "a_bits": UNQUANTIZED_BITS}


@dataclass(frozen=True)
class QuantScheme:
    """How one tensor is mapped to integers.

    Attributes:
        bits: width of a code, 2 to 8.
        group: elements of the last axis that share a scale; ``None`` means the whole axis.
        symmetric: codes are signed and the zero point is 0; otherwise unsigned with a zero point per group.
        clip: the scale is this fraction of the one that reaches the largest magnitude, or how that is searched for.
    """

    bits: int
    group: int | None
    symmetric: bool
    clip: float | str


@dataclass(frozen=True)
class QuarotConfig:
    """Options of the backend: ``torch.compile(model, backend="quarot", options={"w_bits": 8})``.

    Attributes:
        w_bits, a_bits: bits of weights and of the activations that enter them: 2 to 8, or 16 to leave them alone.
        k_bits, v_bits: bits of the keys and values that attention reads, likewise.
        kv_bits: sets both ``k_bits`` and ``v_bits``.
        w_group: input channels of a weight that share a scale; ``None`` is per output channel.
        a_group: channels of an activation that share a scale; ``None`` is per token.
        kv_group: channels of a key or value that share a scale; ``None`` is the head dimension.
        w_sym, a_sym, kv_sym: symmetric codes (True) or asymmetric with a zero point (False).
        w_clip, a_clip, k_clip, v_clip: clip ratio in (0, 1]. ``w_clip="search"`` finds the one with the least error of
            the weight, for every group. :func:`quarot_fx.calibrate` finds those with the least error on data:
            ``w_clip="output"`` and ``a_clip="output"``, of the output of every layer, and ``k_clip="search"`` and
            ``v_clip="search"``, of all keys and all values. Where ``a_clip``, ``k_clip`` or ``v_clip`` is not given, it
            becomes the ratio that ``DEFAULT_CLIPS`` has for the bits; so does that of an override that gives
            ``a_bits``, unless it or the config says what ``a_clip`` is.
        kv_clip: sets both ``k_clip`` and ``v_clip``.
        w_rounding: of weights: ``"nearest"``; ``"gptq"``, for which :func:`quarot_fx.calibrate` has to run first; or
            ``"tuned"``, either of these with the scales that :func:`quarot_fx.tune_scales` found.
            Embeddings that are quantised are always rounded to nearest: no product reads them.
        rotation: ``"hadamard"`` (randomised Hadamard matrices), ``"random"`` (random orthogonal matrices where
            weights absorb them, Hadamard where they run online) or ``"none"``.
        seed: of the random signs or matrices; the same seed gives the same weights on every machine.
        learned_rotations: what :func:`quarot_fx.learn_rotations` returned, or a folder that it was saved to: these take
            the place of random matrices wherever weights absorb them. Kept as the name of the set.
        key_balance: :class:`quarot_fx.KeyBalances`, or a folder that they were saved to: matrices by which keys that
            are quantised are balanced against queries. ``"search"`` lets :func:`quarot_fx.calibrate` find them. Kept
            as the name of the set.
        overrides: weight options by parameter name, ``{"*.down_proj": {"w_bits": 8}, "*.gate": "skip"}``. Patterns
            are those of ``fnmatch`` and match with or without the final ``.weight``; the last match wins.
            Naming an output head or an embedding here is how one asks for it to be quantised.
        pipeline: passes to run, as text (``"fold-biases,fold-gains,..."``); ``None`` is the default pipeline.
        stop_after: name of the last pass to run.
        disabled_passes: names of passes to leave out.
        nested_backend: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"``, ``"eager"`` or any name
            that ``torch.compile`` knows.
        mode: of the nested backend, as ``torch.compile``'s own, which takes either a mode or options: ``"default"``,
            ``"reduce-overhead"`` (CUDA graphs), ``"max-autotune"`` or ``"max-autotune-no-cudagraphs"``.
        kernels: which nodes are fused into ops with kernels: ``"auto"``, those that a provider runs on the device at
            hand; ``"reference"``, all, to be run by the ops' references where there is no kernel; or ``"none"``.
        check: after each pass that must not change the output, run both graphs in float64 and compare.
        free_originals: release the original weights as soon as their quantised form exists.

    Raises:
        OptionError: a value is out of range.
        UnknownOptionError: an override names an option that a weight does not have.
        LearnedRotationsFileError: the folder does not hold learned rotations.
        KeyBalancesFileError: the folder does not hold balances.
    """

    w_bits: int = 4
    a_bits: int = 4
    k_bits: int = 4
    v_bits: int = 4
    kv_bits: int | None = None
    w_group: int | None = None
    a_group: int | None = None
    kv_group: int | None = None
    w_sym: bool = True
    a_sym: bool = True
    kv_sym: bool = False
    w_clip: float | str = "search"
    w_rounding: str = "nearest"
    a_clip: float | str = None  # type: ignore[assignment]  # a ratio as soon as the config is made, by the bits
    k_clip: float | str = None  # type: ignore[assignment]
    v_clip: float | str = None  # type: ignore[assignment]
    kv_clip: float | str | None = None
    rotation: str = "hadamard"
    seed: int = 0
    learned_rotations: LearnedRotations | Path | str | None = None
    key_balance: KeyBalances | Path | str | None = None
    overrides: Mapping[str, Mapping[str, Any] | str] | tuple[Any, ...] = ()
    pipeline: str | None = None
    stop_after: str | None = None
    disabled_passes: tuple[str, ...] = ()
    nested_backend: str = "inductor"
    mode: str | None = None
    kernels: str = "auto"
    check: bool = False
    free_originals: bool = False

    def __post_init__(self) -> None:
        if self.kv_bits is not None:
            self._set("k_bits", self.kv_bits)
            self._set("v_bits", self.kv_bits)
            self._set("kv_bits", None)  # so that replace(config, k_bits=...) is not overruled
        if self.kv_clip is not None:
            check_clip("kv_clip", self.kv_clip)
            self._set("k_clip", self.kv_clip)
            self._set("v_clip", self.kv_clip)
            self._set("kv_clip", None)
        if isinstance(self.disabled_passes, str):
            self._set("disabled_passes", (self.disabled_passes,))
        self._set("disabled_passes", tuple(self.disabled_passes))
        self._set("overrides", _frozen_overrides(self.overrides, clips_by_bits=self.a_clip is None))
        if self.learned_rotations is not None:
            from quarot_fx.learning.rotations import name_of  # which needs torch

            self._set("learned_rotations", name_of(self.learned_rotations))
        if self.key_balance not in (None, SEARCH):
            from quarot_fx.balance import KeyBalances

            self._set("key_balance", KeyBalances.known(self.key_balance).name)
        for name in ("w_bits", "a_bits", "k_bits", "v_bits"):
            check_bits(name, getattr(self, name))
        for name in ("w_group", "a_group", "kv_group"):
            check_group(name, getattr(self, name))
        for name in DEFAULT_CLIPS:
            if getattr(self, name) is None:
                self._set(name, default_clip(name, getattr(self, f"{name[0]}_bits")))
        for name in ("w_clip", "a_clip", "k_clip", "v_clip"):
            check_clip(name, getattr(self, name))
        for name in ("w_sym", "a_sym", "kv_sym", "check", "free_originals"):
            check_flag(name, getattr(self, name))
        check_integer("seed", self.seed, 0)
        check_choice("rotation", self.rotation, ROTATIONS)
        if self.rotation == "none" and self.learned_rotations is not None:
            reason = "rotates with rotation='none', which is to rotate nothing"
            raise OptionError(name="learned_rotations", value=self.learned_rotations, reason=reason)
        check_choice("kernels", self.kernels, KERNELS)
        check_choice("w_rounding", self.w_rounding, ROUNDINGS)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> QuarotConfig:
        """Build a config from the ``options`` of ``torch.compile``.

        Raises:
            UnknownOptionError: a name is not an option; the nearest one is suggested.
        """
        return from_mapping(cls, "option", options)

    def of_weights(self) -> QuarotConfig:
        """Return the config with the defaults for all options of the run: what constants depend on."""
        return replace(self, **{name: getattr(QuarotConfig, name) for name in OF_THE_RUN})

    def as_options(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, as JSON-able data that :meth:`from_options` takes; clip
        ratios always, so that what was made with them is not changed by other defaults.
        """
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.overrides:
            options["overrides"] = self._override_patterns
        changed = {name: value for name, value in options.items() if value != getattr(QuarotConfig, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    @property
    def key_scheme(self) -> QuantScheme:
        """How keys are quantised (per token and head)."""
        return QuantScheme(self.k_bits, self.kv_group, self.kv_sym, self.k_clip)

    @property
    def value_scheme(self) -> QuantScheme:
        """How values are quantised (per token and head)."""
        return QuantScheme(self.v_bits, self.kv_group, self.kv_sym, self.v_clip)

    @property
    def weight_scheme(self) -> QuantScheme:
        """How a weight is quantised (per output channel or group)."""
        return QuantScheme(self.w_bits, self.w_group, self.w_sym, self.w_clip)

    @property
    def activation_scheme(self) -> QuantScheme:
        """How the activation that enters a weight is quantised (per token or group)."""
        return QuantScheme(self.a_bits, self.a_group, self.a_sym, self.a_clip)

    @property
    def needs_calibration(self) -> bool:
        """Whether weights or clip ratios depend on calibration data."""
        every = [vars(self), *self._override_patterns.values()]
        found = {(name, one.get(name)) for one in every for name in CALIBRATED}
        return any(value in CALIBRATED[name] for name, value in found)

    def with_provisional_clips(self) -> QuarotConfig:
        """Return the config with nothing clipped where calibration has still to find the ratio of an activation."""

        def known(options: Mapping[str, Any]) -> dict[str, Any]:
            unknown = {name for name in ("a_clip", "k_clip", "v_clip") if options.get(name) in SEARCHED_CLIPS[name]}
            return {**options, **dict.fromkeys(unknown, 1.0)}

        overrides = {pattern: known(changes) for pattern, changes in self._override_patterns.items()}
        own = known({"a_clip": self.a_clip, "k_clip": self.k_clip, "v_clip": self.v_clip})
        return replace(self, overrides=overrides, **own)

    @cached_property
    def _override_patterns(self) -> dict[str, dict[str, Any]]:
        return {pattern: dict(changes) for pattern, changes in tuple(self.overrides)}

    @cached_property
    def _matchers(self) -> list[tuple[str, Callable[[str], Any]]]:
        """Functions that tell whether a pattern matches; there may be one for every layer of a model."""
        return [(pattern, re.compile(fnmatch.translate(pattern)).match) for pattern in self._override_patterns]

    def override_for(self, parameter: str) -> str | None:
        """Return the pattern in ``overrides`` that decides for a parameter, or ``None``."""
        name = parameter.removesuffix(".weight")
        return next(
            (pattern for pattern, is_match in reversed(self._matchers) if is_match(name) or is_match(parameter)), None
        )

    def own_options(self, parameter: str) -> Mapping[str, Any]:
        """Return what ``overrides`` say of one parameter."""
        return self._override_patterns.get(self.override_for(parameter) or "", {})

    def for_parameter(self, parameter: str) -> QuarotConfig:
        """Return the config that holds for one parameter, overrides applied."""
        own = self.own_options(parameter)
        return replace(self, overrides=(), **own) if own else self

    def with_options(self, changes: Mapping[str, Any]) -> QuarotConfig:
        """Return the config with some options changed."""
        return replace(self, **changes)

    def check_not_tuned(self) -> None:
        """Raise an OptionError if any weight is to have tuned scales, where these are still to be found."""
        if "tuned" in {self.w_rounding, *(one.get("w_rounding") for one in self._override_patterns.values())}:
            reason = "is what tune_scales ends with: say how weights are rounded before it, 'nearest' or 'gptq'"
            raise OptionError(name="w_rounding", value="tuned", reason=reason)

    def with_rounding(self, rounding: str) -> QuarotConfig:
        """Return the config with all weights that are quantised rounded in one way."""
        overrides = {
            pattern: {name: rounding if name == "w_rounding" else value for name, value in own.items()}
            for pattern, own in self._override_patterns.items()
        }
        return replace(self, w_rounding=rounding, overrides=overrides)

    def with_overrides(self, changes: Mapping[str, Mapping[str, Any]]) -> QuarotConfig:
        """Return the config with further options for some parameters, by their names, beside those that these have."""
        added = {
            _literally(parameter.removesuffix(".weight")): {**self.own_options(parameter), **options}
            for parameter, options in changes.items()
        }
        kept = {pattern: one for pattern, one in self._override_patterns.items() if pattern not in added}
        return replace(self, overrides={**kept, **added})


def _literally(name: str) -> str:
    """Return the pattern that matches a name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _frozen_overrides(overrides: Any, clips_by_bits: bool) -> tuple[Any, ...]:
    """Turn ``{"*.x": {"w_bits": 8}}`` into nested tuples, so that a config stays hashable.

    Args:
        overrides: as the user gives them, or as nested tuples.
        clips_by_bits: whether activations that are given other bits get the clip ratio that goes with these.
    """
    frozen = []
    for pattern, changes in overrides.items() if isinstance(overrides, Mapping) else overrides:
        if changes in ("skip", None):
            changes = SKIP
        elif isinstance(changes, str):
            raise OptionError(name="overrides", value={pattern: changes}, reason="give a mapping, or 'skip'")
        changes = dict(changes)
        for name in changes:
            if name not in OVERRIDABLE:
                raise UnknownOptionError("override", str(name), OVERRIDABLE)
        bits = changes.get("a_bits", UNQUANTIZED_BITS)
        check_bits("a_bits", bits)
        if clips_by_bits and bits != UNQUANTIZED_BITS:
            changes = {"a_clip": default_clip("a_clip", bits), **changes}
        frozen.append((pattern, tuple(sorted(changes.items()))))
    return tuple(frozen)


def default_clip(name: str, bits: int) -> float:
    """Return the clip ratio of an option where none is given."""
    return next((clip for most, clip in DEFAULT_CLIPS[name].items() if bits <= most), 1.0)


def check_bits(name: str, bits: Any) -> None:
    """Raise an OptionError unless an option is a number of bits."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not (2 <= bits <= 8 or bits == UNQUANTIZED_BITS):
        raise OptionError(name=name, value=bits, reason=f"must be 2 to 8, or {UNQUANTIZED_BITS} to leave alone")


def check_group(name: str, group: Any) -> None:
    """Raise an OptionError unless an option is the size of a group, or None."""
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise OptionError(name=name, value=group, reason="must be a positive integer, or None for no groups")


def check_clip(name: str, clip: Any) -> None:
    """Raise an error unless an option is a clip ratio, or a way to search for it that the option knows."""
    searches = SEARCHED_CLIPS.get(name, ())
    if isinstance(clip, str) and searches:
        if clip not in searches:
            raise UnknownOptionError(name, clip, searches)
        return
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip <= 1:
        also = "".join(f', or "{search}"' for search in searches)
        raise OptionError(name=name, value=clip, reason=f"must be a ratio in (0, 1]{also}")
