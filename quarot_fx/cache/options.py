"""The options of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarot_fx.balance import KeyBalances
from quarot_fx.cache.formats import Format, PlainFormat, QuantizedFormat
from quarot_fx.config import SEARCH, UNQUANTIZED_BITS, QuarotConfig, check_bits, check_clip, check_group, default_clip
from quarot_fx.errors import OptionError
from quarot_fx.option_checks import check_choice, from_mapping

ROTATIONS = ("hadamard", "none")


@dataclass(frozen=True)
class CacheOptions:
    """How a cache codes keys and values.

    Attributes:
        k_bits, v_bits: bits of keys and values: 2 to 8, or 16 to keep them in the model's dtype.
        kv_bits: sets both.
        group: channels that share a scale, a divisor of head_dim; ``None`` is head_dim.
        k_clip, v_clip: ratio in (0, 1] of the range that codes cover; where it is not given, that of
            :data:`~quarot_fx.config.DEFAULT_CLIPS` for the bits.
        clip: sets both.
        rotation: ``"hadamard"``, or ``"none"``.
        key_balance: :class:`~quarot_fx.KeyBalances` of the model, their name, or a folder of them.

    Raises:
        OptionError: a value is out of range.
        UnknownOptionError: there is no such rotation.
    """

    k_bits: int = 4
    v_bits: int = 4
    kv_bits: int | None = None
    group: int | None = None
    k_clip: float = None  # type: ignore[assignment]  # a ratio as soon as the options are made
    v_clip: float = None  # type: ignore[assignment]
    clip: float | None = None
    rotation: str = "hadamard"
    key_balance: KeyBalances | Path | str | None = None

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits", "kv_bits"):
            if getattr(self, name) is not None or name != "kv_bits":
                check_bits(name, getattr(self, name))
        check_group("group", self.group)
        for name, bits in (("k_clip", self.kv_bits or self.k_bits), ("v_clip", self.kv_bits or self.v_bits)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default_clip(name, bits))
        for name in ("k_clip", "v_clip", "clip"):
            clip = getattr(self, name)
            if isinstance(clip, str):
                raise OptionError(name=name, value=clip, reason="must be a ratio in (0, 1]: calibration finds one")
            if clip is not None or name != "clip":
                check_clip(name, clip)
        check_choice("rotation", self.rotation, ROTATIONS)
        if self.key_balance == SEARCH:
            raise OptionError(
                name="key_balance", value=SEARCH, reason="must be a set of balances: calibration finds one"
            )
        if self.key_balance is not None:
            object.__setattr__(self, "key_balance", KeyBalances.known(self.key_balance).name)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> CacheOptions:
        """Read keyword arguments.

        Raises:
            UnknownOptionError: a name is not an option; the nearest one is suggested.
        """
        return from_mapping(cls, "option of a cache", options)

    @classmethod
    def of_config(cls, config: QuarotConfig) -> CacheOptions:
        """Return how a cache codes what a graph without one quantises by these options. Where the graph rotates, the
        cache does by a Hadamard matrix, with ``rotation="random"``, too.

        Raises:
            OptionError: codes are to be symmetric; those of a cache have a zero point.
        """
        if config.kv_sym and min(config.k_bits, config.v_bits) < UNQUANTIZED_BITS:
            raise OptionError(name="kv_sym", value=True, reason="codes of a cache have a zero point")
        rotation = "none" if config.rotation == "none" else "hadamard"
        return cls(
            config.k_bits,
            config.v_bits,
            group=config.kv_group,
            k_clip=config.k_clip,  # type: ignore[arg-type]  # a ratio, or refused
            v_clip=config.v_clip,  # type: ignore[arg-type]
            rotation=rotation,
            key_balance=config.key_balance,
        )

    def balances(self, layers: int) -> tuple[str | None, ...]:
        """Return how the keys of so many layers are balanced, by name.

        Raises:
            OptionError: the balances are those of a model with another number of layers.
        """
        if self.key_balance is None:
            return (None,) * layers
        found = KeyBalances.known(self.key_balance)
        if len(found) != layers:
            reason = f"has balances of {len(found)} layers, and the cache stores keys of {layers}"
            raise OptionError(name="key_balance", value=self.key_balance, reason=reason)
        return tuple(one.balance for one in found)

    def formats(self, balance: str | None = None) -> tuple[Format, Format]:
        """Return the formats of keys, balanced by matrices if any are named, and of values."""
        return (
            self._format(self.kv_bits or self.k_bits, self.clip or self.k_clip, balance),
            self._format(self.kv_bits or self.v_bits, self.clip or self.v_clip),
        )

    def _format(self, bits: int, clip: float, balance: str | None = None) -> Format:
        if bits == UNQUANTIZED_BITS:
            return PlainFormat()
        return QuantizedFormat(bits, self.group, clip, self.rotation, balance)
