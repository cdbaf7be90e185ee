"""``quarot_fx.learn_rotations``: optimises the matrices that a model's weights absorb."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from quarot_fx.calibration.data import Data, calibration_tokens
from quarot_fx.calibration.programs import Programs, capture_programs, device_of
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import CalibrationDataError, NothingToLearnError
from quarot_fx.learning.cayley import CayleyAdam
from quarot_fx.learning.losses import cross_entropy, divergence
from quarot_fx.learning.network import Network
from quarot_fx.learning.options import LearningOptions
from quarot_fx.learning.precision import fast_products
from quarot_fx.learning.rotations import LearnedRotation, LearnedRotations
from quarot_fx.learning.training import batches, cosine, cut, gradients_of, network_of
from quarot_fx.passes.quantize_embeddings import QuantizeEmbeddings
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.progress import track
from quarot_fx.rotation import Rotation

OF_WEIGHTS = (QuantizeWeights, QuantizeEmbeddings)


def learn_rotations(
    model: Callable[..., Any],
    data: Data,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 2048,
    learning: LearningOptions | Mapping[str, Any] | None = None,
    **options: Any,
) -> LearnedRotations:
    """Optimise the rotations that a model's weights absorb, so that quantisation changes its predictions least.

    The model is captured and rotated as the backend does it. Rotations that cost nothing, since weights absorb them,
    are moved along the gradient of the quantised graph's loss, on the manifold of orthogonal matrices; those that run
    online stay Hadamards. The model itself stays as it is: give the result to ``torch.compile``, ``rewrite`` or
    ``calibrate`` as the option ``learned_rotations``.

    Args:
        model: an ``nn.Module`` in eval mode that takes token ids [batch, length] first and returns logits; it has to
            trace to one graph.
        data: as for :func:`quarot_fx.calibrate`, and best the same.
        tokenizer: of a text, as transformers calls it.
        samples: windows that are drawn from a text.
        length: tokens in a window of a text.
        learning: options of learning, or a mapping of such.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`; how activations are quantised decides which rotation
            is best. ``learned_rotations`` is where to start.

    Returns:
        The matrices, with the loss of every step; ``print`` shows them.

    Raises:
        CalibrationDataError: the data cannot be used, or is less than a batch.
        NothingToLearnError: no rotation is absorbed by weights, or nothing is quantised.
        LearningError: the model returns no logits, has an operator without a gradient, or its loss is not finite.
        NotOneGraphError: the model has graph breaks, or no parameters.
        UnboundParameterError: a parameter is on the meta device.
    """
    start = time.perf_counter()
    config = QuarotConfig.from_options(options)
    how = learning if isinstance(learning, LearningOptions) else LearningOptions.from_options(learning)
    tokens = cut(calibration_tokens(data, tokenizer, samples, length, config.seed), how.length).to(device_of(model))
    if len(tokens) < how.batch:
        reason = f"{len(tokens)} sequences are less than a batch of {how.batch}"
        raise CalibrationDataError(reason=reason, remedy="Give more, or a smaller batch.")
    programs = capture_programs(model, tokens[: how.batch], config, () if how.weights == "nearest" else OF_WEIGHTS)
    free = _free_bases(programs, how)
    network, token_input = _network(programs, tokens, how)
    optimizer = CayleyAdam([Rotation.parse(name).matrix().to(tokens.device) for name, _ in free.values()])
    losses = []
    for step, batch in enumerate(track(list(batches(tokens, how.batch, how.steps, how.seed)), "rotations")):
        matrices = {number: q.float() for number, q in zip(free, optimizer.matrices, strict=True)}
        loss, gradients = _loss(network, matrices, {token_input: batch}, batch, how.loss)
        optimizer.step(gradients, cosine(how.rate, step, how.steps))
        losses.append(loss)
    learned = [
        LearnedRotation(Rotation.of_matrix(matrix), absorbed_by)
        for matrix, (_, absorbed_by) in zip(optimizer.matrices, free.values(), strict=True)
    ]
    return LearnedRotations(learned, asdict(how), losses, time.perf_counter() - start)


def _free_bases(programs: Programs, options: LearningOptions) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Return the rotations to learn: number of a basis -> its rotation now, and what absorbs it."""
    plan = programs.rotated.plan
    assert plan is not None, "the pipeline places rotations"
    free = {
        number: (basis.rotation, basis.absorbed_by)
        for number, basis in enumerate(plan.bases)
        if basis.is_free and (options.heads or not basis.of_heads)
    }
    if not free:
        raise NothingToLearnError(reason="weights alone absorb none under these options")
    return free


def _network(programs: Programs, tokens: Tensor, options: LearningOptions) -> tuple[Network, fx.Node]:
    """Return the quantised program as a function, and the node of its token ids."""
    shape = tokens[: options.batch].shape
    network, token_input = network_of(programs, programs.quantized, shape, options.recompute)
    if not network.quantizes():
        raise NothingToLearnError(reason="nothing is quantised under these options, so that all rotations are equal")
    return network, token_input


def _loss(
    network: Network, matrices: Mapping[int, Tensor], varying: Mapping[fx.Node, Any], tokens: Tensor, kind: str
) -> tuple[float, list[Tensor]]:
    """Return the loss of a batch and its gradients by the matrices."""
    with fast_products():
        expected = None
        if kind == "divergence":
            with torch.no_grad():
                expected = network(varying, matrices, quantized=False)
        with torch.enable_grad():
            leaves = {number: matrix.requires_grad_() for number, matrix in matrices.items()}
            logits = network(varying, leaves)
            loss = cross_entropy(logits, tokens) if expected is None else divergence(logits, expected)
            gradients = gradients_of(loss, list(leaves.values()))
    return loss.item(), gradients
