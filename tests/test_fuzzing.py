"""Soundness by fuzzing: whatever program is drawn, in rotated bases it computes what it computes in its own.

``make fuzz`` draws thousands, other ones every time; a counterexample prints as a tree of productions.
"""

from __future__ import annotations

from typing import Any

from decoder_grammar import Program, programs
from fuzzing import CONFIGS, check_quantized, check_rotated, fuzzed
from hypothesis import Phase, event, given, settings


@fuzzed(few=120, share=0.8)
@given(programs(), CONFIGS)
def test_rotated_programs_are_equal(program: Program, options: dict[str, Any]) -> None:
    plan = check_rotated(program, options)
    event(f"transforms: {'none' if not plan.transforms else 'online' if plan.online else 'free'}")


@fuzzed(few=40, share=0.2)
@given(programs(max_layers=3), CONFIGS)
def test_quantized_programs_run(program: Program, options: dict[str, Any]) -> None:
    check_quantized(program, options)


# -- does it find anything? ------------------------------------------------------------------------


def test_most_programs_are_rotated() -> None:
    rotated: list[bool] = []

    @settings(max_examples=40, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(programs(), CONFIGS)
    def draw(program: Program, options: dict[str, Any]) -> None:
        rotated.append(bool(check_rotated(program, options).transforms))

    draw()
    assert sum(rotated) > 0.5 * len(rotated)
