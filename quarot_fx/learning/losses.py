"""How far predictions are off: per token, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of predictions from those of another model, logits [n, length, vocabulary]
    of each; the mean over tokens.
    """
    losses = [_again(_divergence, one, other) for one, other in zip(logits, expected, strict=True)]
    return sum(losses[1:], losses[0]) / len(losses)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each next token, from logits [n, length, vocabulary] and ids
    [n, length].
    """
    losses = [_again(_cross_entropy, one, ids) for one, ids in zip(logits, tokens, strict=True)]
    return sum(losses[1:], losses[0]) / len(losses)


def _again(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """Compute a sequence's loss so that its probabilities, of the whole vocabulary, are not kept."""
    result: Tensor = checkpoint(loss, logits, other, use_reentrant=False, preserve_rng_state=False)
    return result


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    predicted, wanted = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    return F.kl_div(predicted, wanted, log_target=True, reduction="sum") / len(logits)


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1].float(), tokens[1:])
