"""``quarot::append_pair``: ``quarot::append`` of keys and of values, at the same positions of two caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.append import CODE_FLIPS, append_rows, check_rows, inputs
from quarot_fx.ops.declaration import OpDeclaration, declare

Arguments = tuple[Any, ...]


def arguments_of_each(
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_balance: str | None,
    v_balance: str | None,
    k_rotation: str | None,
    v_rotation: str | None,
    k_bits: int,
    v_bits: int,
    k_group: int | None,
    v_group: int | None,
    k_clip: float,
    v_clip: float,
) -> tuple[Arguments, Arguments]:
    """Return the arguments of ``quarot::append`` for keys, which cos and sin embed, and for values."""
    keys = (k_codes, k_scale, k_zero, k, position, cos, sin, k_balance, k_rotation, k_bits, k_group, k_clip)
    values = (v_codes, v_scale, v_zero, v, position, None, None, v_balance, v_rotation, v_bits, v_group, v_clip)
    return keys, values


def joined(keys: Arguments, values: Arguments) -> Arguments:
    """Return the arguments of ``quarot::append_pair`` for two calls of ``quarot::append``."""
    k_codes, k_scale, k_zero, k, position, cos, sin, *k_scheme = keys
    v_codes, v_scale, v_zero, v, _, _, _, *v_scheme = values
    schemes = (value for pair in zip(k_scheme, v_scheme, strict=True) for value in pair)
    return (k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, k, v, position, cos, sin, *schemes)


def _reference(*args: Any) -> None:
    """Store keys and values in their caches, each as :func:`quarot_fx.ops.append.append_rows` says."""
    for each in arguments_of_each(*args):
        append_rows(*each)


def _fake(*args: Any) -> None:
    for each in arguments_of_each(*args):
        check_rows(*each)


def _inputs(generator: torch.Generator) -> Iterator[Arguments]:
    """Yield pairs of what ``quarot::append`` takes, at the same positions: each with itself, without its embedding."""
    for keys in inputs(generator):
        codes, scale, zero, x, position, _, _, *scheme = keys
        values = (*(tensor.clone() for tensor in (codes, scale, zero)), x.flip(1), position, None, None, *scheme)
        yield joined(keys, values)


append_pair = declare(
    OpDeclaration(
        schema="append_pair(Tensor(a!) k_codes, Tensor(b!) k_scale, Tensor(c!) k_zero, Tensor(d!) v_codes, "
        "Tensor(e!) v_scale, Tensor(f!) v_zero, Tensor k, Tensor v, Tensor position, Tensor? cos, Tensor? sin, "
        "str? k_balance, str? v_balance, str? k_rotation, str? v_rotation, int k_bits, int v_bits, int? k_group, "
        "int? v_group, float k_clip, float v_clip) -> ()",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        is_traceable=False,  # it writes
        tolerance={torch.float32: 1e-5},
        code_flips=CODE_FLIPS,
    )
)
