"""Needles in a haystack: words hidden in a long text, which the model is asked for at its end."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from quarot_fx.errors import OptionError
from quarot_fx.progress import track
from quarot_fx.text import fingerprint

NEEDLE = "\n\nThe secret word of {name} is {word}.\n\n"
QUESTION = "\n\nThe secret word of {name} is"
ANSWER = " {word}"
NAMES = ("Alice", "Robert", "Berlin", "Diana", "the castle", "Lisbon", "Oliver", "the river", "Emma", "Chicago")
# No two begin with one letter, so that their first tokens differ whatever the tokenizer.
WORDS = ("lantern", "violin", "harbor", "pepper", "tiger", "candle", "rocket", "marble", "saddle", "walnut")


@dataclass(frozen=True)
class Needle:
    """A text that hides a word, and asks for it at its end.

    Attributes:
        depth: where it is hidden: 0 is the beginning, 1 the end.
        word: index of it in ``WORDS``.
        token_ids: int64 [1, length], the question at the end, and what all answers to it begin with.
        answers: int64 [words], the token that follows for each of ``WORDS``.
    """

    depth: float
    word: int
    token_ids: torch.Tensor
    answers: torch.Tensor

    @torch.no_grad()
    def lead(self, model: Any) -> tuple[float, int]:
        """Return by how many nats the hidden word is likelier than the likeliest other one, and the likeliest token.

        Words are compared with each other alone: that a small model would rather go on with a quotation mark says
        nothing of whether it knows what stands between such.
        """
        logits = model(input_ids=self.token_ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        of_words = logits[self.answers]
        others = torch.cat((of_words[: self.word], of_words[self.word + 1 :]))
        return (of_words[self.word] - others.max()).item(), int(logits.argmax())


@dataclass(frozen=True)
class Needles:
    """Needles in texts of several lengths, at several depths.

    Attributes:
        name: of the text in which they are hidden.
        sha256: of the text.
        haystack: its token ids, int64 [any].
        tokenizer: the model's.
        lengths: in tokens, needle and question included.
        depths: so many needles a length, from its beginning to its end.
    """

    name: str
    sha256: str
    haystack: torch.Tensor
    tokenizer: Any
    lengths: tuple[int, ...]
    depths: int

    @classmethod
    def of_text(cls, name: str, text: str, tokenizer: Any, lengths: str, depths: int, device: str) -> Needles:
        """Hide needles in a text, of which there are ``lengths``, numbers of tokens separated by commas.

        Raises:
            OptionError: one of the lengths is no number.
        """
        haystack = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].to(device)
        return cls(name, fingerprint(text), haystack, tokenizer, parse_lengths(lengths), depths)

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
            OptionError: the text is too short for this length, or the length for needle and question; or the tokenizer
                does not tell words apart.
        """
        chance = random.Random(length)
        for place in range(self.depths):
            name, word = chance.choice(NAMES), chance.randrange(len(WORDS))
            statement = self._tokens(NEEDLE.format(name=name, word=WORDS[word]))
            question, answers = self._question(name)
            around = length - len(statement) - len(question)
            if not 0 < around <= len(self.haystack):
                reason = f"leaves {around} tokens around a needle, and the text has {len(self.haystack)}"
                raise OptionError(name="needles", value=length, reason=reason)
            depth = (place + 0.5) / self.depths
            before = round(around * depth)
            parts = (self.haystack[:before], statement, self.haystack[before:around], question)
            yield Needle(depth, word, torch.cat(parts)[None], answers)

    def _question(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that the question and all answers begin with, and the next one of each answer."""
        asked = [self._tokens(QUESTION.format(name=name) + ANSWER.format(word=word)).tolist() for word in WORDS]
        common = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*asked, strict=False))))
        answers = {tokens[common] for tokens in asked if len(tokens) > common}
        if len(answers) < len(WORDS):
            raise OptionError(name="needles", value=WORDS, reason="the tokenizer writes two of these words alike")
        tokens = self.haystack.new_tensor([tokens[: common + 1] for tokens in asked])
        return tokens[0, :-1], tokens[:, -1]

    def _tokens(self, text: str) -> torch.Tensor:
        token_ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return token_ids.to(self.haystack.device)

    def measure(self, model: Any, label: str) -> dict[str, Any]:
        """Return which needles a model finds; shows progress.

        Returns:
            for JSON: ``needles``, each with its ``length``, its ``depth``, its ``word``, what the model ``said``, the
            ``lead`` of the word in nats and whether it was ``found``; and ``needle_seconds``.
        """
        start, results = time.perf_counter(), []
        for length in self.lengths:
            for needle in track(list(self.hidden(length)), f"{label}, {length} tokens"):
                lead, likeliest = needle.lead(model)
                known = {"length": length, "depth": needle.depth, "word": WORDS[needle.word]}
                said = self.tokenizer.decode([likeliest])
                results.append({**known, "said": said, "lead": lead, "found": lead > 0})
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
