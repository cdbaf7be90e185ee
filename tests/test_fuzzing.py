"""Soundness by fuzzing: whatever program is drawn, in rotated bases it computes what it computes in its own.

``make fuzz`` draws thousands, other ones every time; a counterexample prints as a tree of productions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_grammar import Program, programs
from fuzzing import CONFIGS, EXPLORED, check_compiled, check_quantized, check_rotated, fuzzed
from hypothesis import event, given

from quarot_fx.basis.operator import Operator
from quarot_fx.basis.rules import rules
from quarot_fx.basis.rules.elementwise import broadcast

aten = torch.ops.aten


@fuzzed(few=120, share=0.8)
@given(programs(max_layers=5 if EXPLORED else 2), CONFIGS)
def test_rotated_programs_are_equal(program: Program, options: dict[str, Any]) -> None:
    plan = check_rotated(program, options)
    event(f"transforms: {'none' if not plan.transforms else 'online' if plan.online else 'free'}")


@fuzzed(few=30, share=0.15)
@given(programs(max_layers=2), CONFIGS)
def test_quantized_programs_run(program: Program, options: dict[str, Any]) -> None:
    check_quantized(program, options)


@fuzzed(few=10, share=0.05, shrinks=False)  # as tracing takes its time
@given(programs(max_layers=2), CONFIGS)
def test_compiled_programs_are_equal(program: Program, options: dict[str, Any]) -> None:
    check_compiled(program, options)


# -- would it find anything? -----------------------------------------------------------------------


def test_most_programs_are_rotated() -> None:
    found = []

    @fuzzed(few=20)
    @given(programs(max_layers=2), CONFIGS)
    def draw(program: Program, options: dict[str, Any]) -> None:
        found.append(bool(check_rotated(program, options).transforms))

    draw()
    assert sum(found) > 0.5 * len(found)


def passes_every_basis_on(op: Operator) -> None:
    """A rule that is wrong of all that is not linear, and of sums with something that is the same along an axis."""
    for use in op.uses:
        for axis, result in broadcast(use, op.result):
            if axis is not None:
                op.tie(axis, result)


@pytest.mark.parametrize(
    "operators",
    [
        pytest.param([aten.silu.default, aten.gelu.default, aten.relu.default], id="activations"),
        pytest.param([aten.mul.Tensor], id="products"),
        pytest.param([aten.add.Tensor, aten.sub.Tensor], id="sums", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_rule_is_found(operators: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in operators:
        monkeypatch.setitem(rules(), str(operator), passes_every_basis_on)

    @fuzzed(few=150, shrinks=False)
    @given(programs(max_layers=2), CONFIGS)
    def draw(program: Program, options: dict[str, Any]) -> None:
        check_rotated(program, options)

    with pytest.raises(AssertionError, match="off by"):
        draw()
