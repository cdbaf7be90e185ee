"""Zero-shot tasks of the object that runs: lm-eval, EleutherAI's harness, calls the compiled model itself.

This module needs the extra ``eval``; :mod:`quarot_fx.cli.tasks` says so where it is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM

from quarot_fx.errors import NotFoundError, OptionError

SHORTEST = 32  # tokens that a sequence is padded to, at least


class CompiledLM(HFLM):
    """A compiled model as lm-eval calls it, at few shapes, so that it is not compiled for every length of a text.

    Sequences are padded after their end to the next power of two, and batches to their full size. Attention is causal:
    no token sees the padding.

    Args:
        runnable: what ``torch.compile`` returned, or the model itself.
        network: the model, which is asked for its config and its device, and never run.
        tokenizer: the model's.
        batch_size: sequences in a batch.

    Attributes:
        shapes: how often the model was called at each shape [batch, length].

    Raises:
        NotFoundError: neither the tokenizer nor the model has a token to begin or end a text with.
    """

    def __init__(self, runnable: Any, network: Any, tokenizer: Any, batch_size: int) -> None:
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, network.config.bos_token_id)
        prefix = next((token for token in candidates if token is not None), None)
        if prefix is None:
            remedy = "Tasks need one before the first word: give the tokenizer a bos_token or an eos_token."
            raise NotFoundError(kind="first token in", name=type(tokenizer).__name__, remedy=remedy)
        super().__init__(
            pretrained=network, backend="causal", tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=prefix
        )
        self._runnable = runnable
        self.shapes: Counter[tuple[int, int]] = Counter()

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Return logits [batch, length, vocabulary] of token ids [batch, length]."""
        batch, length = inps.shape
        padded = F.pad(inps, (0, padded_length(length, self.max_length) - length, 0, self.batch_size - batch))
        self.shapes[padded.shape[0], padded.shape[1]] += 1
        with torch.no_grad():
            return self._runnable(input_ids=padded, use_cache=False).logits[:batch, :length]

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            reason = f"an answer has {longest} tokens, and the model takes {self.max_length}"
            raise OptionError(name="tasks", value="", reason=reason)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse tasks that generate: transformers' ``generate`` would run the model that is not compiled.

        Raises:
            OptionError: always.
        """
        names = sorted({str(request.task_name) for request in requests})
        reason = "generates text; tasks are measured that rank given answers by their likelihood"
        raise OptionError(name="tasks", value=",".join(names), reason=reason)


def padded_length(length: int, longest: int) -> int:
    """Return the power of two that a sequence is padded to, or the longest that the model takes if that is less."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), longest)
