"""From productions to strategies: the annotations of a function's parameters are the grammar."""

from __future__ import annotations

import inspect
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

_PRODUCTIONS: dict[type, list[Callable[..., Any]]] = defaultdict(list)
NONE_PER_SOME = 4  # how much rarer something optional is than nothing


def production(symbol: type, weight: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as one way to compute a symbol, drawn ``weight`` times as often as others.

    Keyword-only parameters are its choices.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _PRODUCTIONS[symbol] += [function] * weight
        return function

    return enter


@dataclass(frozen=True)
class Step:
    """A production with its choices made; calling it computes."""

    function: Callable[..., Any]
    choices: Mapping[str, Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **self.choices)

    def __repr__(self) -> str:
        chosen = [(name, self.choices[name]) for name in choices_of(self.function)]
        choices = ", ".join(f"{name}={choice!r}" for name, choice in chosen if choice is not None)
        return f"{self.function.__name__}({choices})"


def steps(symbol: type) -> st.SearchStrategy[Step]:
    """Return the strategy of everything that computes a symbol; the first production is the simplest."""
    return st.one_of([_step(function) for function in _PRODUCTIONS[symbol]])


def choices_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of a production's choices, in order."""
    return inspect.getfullargspec(function).kwonlyargs


def _step(function: Callable[..., Any]) -> st.SearchStrategy[Step]:
    hints = get_type_hints(function)
    choices = {name: _choice(hints[name]) for name in choices_of(function)}
    return st.builds(Step, st.just(function), st.fixed_dictionaries(choices))


def _choice(hint: Any) -> st.SearchStrategy[Any]:
    if hint in _PRODUCTIONS:
        return st.deferred(lambda: steps(hint))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is types.UnionType:
        (some,) = set(get_args(hint)) - {types.NoneType}
        return st.one_of(*[st.none()] * NONE_PER_SOME, _choice(some))
    return {bool: st.booleans(), int: st.integers(0, 5)}[hint]
