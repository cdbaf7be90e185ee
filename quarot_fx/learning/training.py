"""What all learning shares: a program's logits as a function, batches of sequences, and a loss with its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from quarot_fx.calibration.programs import Programs
from quarot_fx.errors import LearningError
from quarot_fx.learning.network import Network
from quarot_fx.program import Program


def network_of(programs: Programs, program: Program, shape: torch.Size, recompute: bool) -> tuple[Network, fx.Node]:
    """Return the logits of a program, one of a model's, as a function, and the node of its token ids.

    Args:
        programs: the model.
        program: the one that is wanted.
        shape: of the token ids, [batch, length].
        recompute: as :class:`Network` has it.

    Raises:
        LearningError: the model returns no logits.
    """
    token_input = programs.token_input(program)
    inputs = {node: value for node, value in programs.inputs(program).items() if node is not token_input}
    return Network(program.graph, _logits(program.graph, shape), inputs, recompute), token_input


def _logits(graph: fx.Graph, shape: torch.Size) -> fx.Node:
    """Return the first output [batch, length, ...] of real numbers."""
    (output,) = graph.find_nodes(op="output")
    for node in tree_leaves(output.args):
        val = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(val, Tensor) and val.is_floating_point() and val.ndim == 3 and val.shape[:2] == shape:
            return node
    reason = f"none of the graph's outputs is one of logits [{', '.join(map(str, shape))}, vocabulary]"
    raise LearningError(reason=reason, remedy="Give a model that returns logits for every token.")


def cut(tokens: Tensor, length: int | None) -> Tensor:
    """Return sequences [n, length] in as many pieces as they have, without their ends that fill none."""
    pieces = 1 if length is None else max(1, tokens.shape[1] // length)
    return tokens if length is None else tokens[:, : pieces * length].reshape(len(tokens) * pieces, -1)


def batches(tokens: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield a batch [size, length] for each step: all sequences in turn, each time in another order."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
        yield tokens[order[:size].to(tokens.device)]
        order = order[size:]


def cosine(rate: float, step: int, steps: int) -> float:
    """Return the rate of a step, the first of which is 0: it falls to 0 along half a cosine."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss, zeros by what it does not depend on.

    Raises:
        LearningError: the loss is not finite, or an operator of the model has no gradient.
    """
    if not loss.isfinite():
        remedy = "Give a model in bfloat16 or float32, whose outputs are finite."
        raise LearningError(reason=f"the loss is {loss.item()}", remedy=remedy)
    try:
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    except NotImplementedError as error:
        remedy = "Quantise it without learning anything."
        raise LearningError(reason=f"an operator has no gradient: {error}", remedy=remedy) from error
