"""Needles in a haystack: words hidden in a long text, which the model is asked for at its end."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quarot_fx.errors import OptionError
from quarot_fx.progress import track

NEEDLE = "\n\nThe secret word of {name} is {word}.\n\n"
QUESTION = "\n\nThe secret word of {name} is"
ANSWER = " {word}"
NAMES = ("Alice", "Robert", "Berlin", "Diana", "the castle", "Lisbon", "Oliver", "the river", "Emma", "Chicago")
WORDS = ("lantern", "violin", "harbor", "pepper", "tiger", "candle", "rocket", "marble", "saddle", "walnut")


@dataclass(frozen=True)
class Needle:
    """A text that hides a word, and ends with it once more.

    Attributes:
        depth: where it is hidden: 0 is the beginning, 1 the end.
        token_ids: int64 [1, length], the question and its answer at the end.
        answer: number of tokens of the answer.
    """

    depth: float
    token_ids: torch.Tensor
    answer: int

    @torch.no_grad()
    def is_found_by(self, model: Any) -> bool:
        """Whether a model that is given the text and the question answers with the word, if it decodes greedily."""
        logits = model(input_ids=self.token_ids, use_cache=False, logits_to_keep=self.answer + 1).logits
        return bool((logits[0, :-1].argmax(-1) == self.token_ids[0, -self.answer :]).all())


@dataclass(frozen=True)
class Needles:
    """Needles in texts of several lengths, at several depths.

    Attributes:
        name: of the text in which they are hidden.
        sha256: of the text.
        haystack: its token ids, int64 [any].
        tokenizer: the model's.
        lengths: in tokens, needle, question and answer included.
        depths: so many needles a length, from its beginning to its end.
    """

    name: str
    sha256: str
    haystack: torch.Tensor
    tokenizer: Any
    lengths: tuple[int, ...]
    depths: int

    @property
    def title(self) -> str:
        """What is measured, in words."""
        return f"needles at {self.depths} depths of {', '.join(map(str, self.lengths))} tokens of {self.name}"

    @property
    def about(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        return {
            "text": {"name": self.name, "sha256": self.sha256},
            "needles": {"lengths": list(self.lengths), "depths": self.depths, "needle": NEEDLE, "question": QUESTION},
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)

    def hidden(self, length: int) -> Iterator[Needle]:
        """Yield a text of so many tokens for every depth.

        Raises:
            OptionError: the text is too short for this length, or the length for needle and question.
        """
        chance = random.Random(length)
        for place in range(self.depths):
            name, word = chance.choice(NAMES), chance.choice(WORDS)
            statement, question = self._tokens(NEEDLE, name, word), self._tokens(QUESTION, name, word)
            answer = self._tokens(QUESTION + ANSWER, name, word)[len(question) :]
            around = length - len(statement) - len(question) - len(answer)
            if not 0 < around <= len(self.haystack):
                reason = f"leaves {around} tokens around a needle, and the text has {len(self.haystack)}"
                raise OptionError(name="needles", value=length, reason=reason)
            depth = (place + 0.5) / self.depths
            before = round(around * depth)
            parts = (self.haystack[:before], statement, self.haystack[before:around], question, answer)
            yield Needle(depth, torch.cat(parts)[None], len(answer))

    def _tokens(self, template: str, name: str, word: str) -> torch.Tensor:
        text = template.format(name=name, word=word)
        token_ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return token_ids.to(self.haystack.device)

    def measure(self, model: Any, label: str) -> dict[str, Any]:
        """Return which needles a model finds; shows progress.

        Returns:
            for JSON: ``needles``, each with its ``length``, its ``depth`` and whether it was ``found``; and
            ``needle_seconds``.
        """
        start, results = time.perf_counter(), []
        for length in self.lengths:
            needles = track(list(self.hidden(length)), f"{label}, {length} tokens")
            results += [{"length": length, "depth": one.depth, "found": one.is_found_by(model)} for one in needles]
        return {"needles": results, "needle_seconds": time.perf_counter() - start}


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read numbers of tokens separated by commas.

    Raises:
        OptionError: one is no number.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(item.isdecimal() and int(item) for item in items):
        raise OptionError(name="needles", value=text, reason="write numbers of tokens: 2048,8192")
    return tuple(map(int, items))
