"""``quarot_fx.tune_scales``: optimises the scales of weights whose codes stay as they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quarot_fx.calibration.data import Data, calibration_tokens
from quarot_fx.calibration.programs import capture_programs, device_of
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import CalibrationDataError, NothingToTuneError
from quarot_fx.learning.cayley import BETAS
from quarot_fx.learning.options import TuningOptions
from quarot_fx.learning.precision import fast_products
from quarot_fx.learning.scaled import ScaledModel, Scales
from quarot_fx.learning.training import batches, cosine, cut, gradients_of
from quarot_fx.learning.tuned import TunedScales
from quarot_fx.passes.quantized import check_clip_is_known
from quarot_fx.progress import track

TUNED = "tuned"


def tune_scales(
    model: Callable[..., Any],
    data: Data,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 2048,
    tuning: TuningOptions | Mapping[str, Any] | None = None,
    **options: Any,
) -> TunedScales:
    """Optimise the scales of weights that are rounded, so that quantisation changes a model's predictions least;
    ``torch.compile`` and ``rewrite`` with the options of the result then use them.

    The quantised program runs with codes as they are; scales are moved along the gradient of the divergence of its
    predictions from the float model's. Some sequences are held out: the scales that are kept are those with the least
    divergence on these, be it those that it all began with. The model itself stays as it is.

    Args:
        model: an ``nn.Module`` in eval mode that takes token ids [batch, length] first and returns logits; it has to
            trace to one graph.
        data: as for :func:`quarot_fx.calibrate`, and best the same, or more of it.
        tokenizer: of a text, as transformers calls it.
        samples: windows that are drawn from a text.
        length: tokens in a window of a text.
        tuning: options of tuning, or a mapping of such.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`; after :func:`quarot_fx.calibrate`, those that it
            returned.

    Returns:
        How far predictions are off, before and after; ``print`` shows it. ``tuned.options`` is for the backend: the
        given ones, with ``w_rounding="tuned"``.

    Raises:
        CalibrationDataError: the data cannot be used, or is less than a batch to tune on and one to hold out.
        NothingToTuneError: no weight is quantised.
        OptionError: ``w_rounding`` is that of the result.
        NotCalibratedError: weights are rounded by calibration, and there was none.
        ClipNotCalibratedError: a clip ratio is to be searched for.
        LearningError: the model returns no logits, has an operator without a gradient, or its loss is not finite.
        NotOneGraphError: the model has graph breaks, or no parameters.
        UnboundParameterError: a parameter is on the meta device.
    """
    start = time.perf_counter()
    config = QuarotConfig.from_options(options)
    how = tuning if isinstance(tuning, TuningOptions) else TuningOptions.from_options(tuning)
    _check(config)
    tokens = cut(calibration_tokens(data, tokenizer, samples, length, config.seed), how.length).to(device_of(model))
    held_out, rest = _split(tokens, how)
    programs = capture_programs(model, tokens[: how.batch], config)
    scaled = ScaledModel(programs, config, tokens[: how.batch].shape, how.recompute)
    if not scaled.scales:
        raise NothingToTuneError
    scales, losses, held_out_losses = _tune(scaled, rest, held_out, how)
    config = config.with_rounding(TUNED)
    scaled.remember(scales, programs.quantized_by(config).quantized)
    return TunedScales(
        options=config.of_weights().as_options(),
        tuning=how,
        weights=len(scales),
        scales=sum(scale.numel() for scale in scales.values()),
        losses=tuple(losses),
        held_out=held_out_losses,
        seconds=time.perf_counter() - start,
    )


def _check(config: QuarotConfig) -> None:
    """Raise an error if options leave something to be found before, or are those of the result."""
    config.check_not_tuned()
    schemes = {"a_clip": config.activation_scheme, "k_clip": config.key_scheme, "v_clip": config.value_scheme}
    for option, scheme in schemes.items():
        check_clip_is_known(scheme, option, "the model")


def _split(tokens: Tensor, options: TuningOptions) -> tuple[Tensor, Tensor]:
    """Return the sequences to hold out, whole batches of them at the end, and the others."""
    count = max(1, round(len(tokens) * options.held_out / options.batch)) * options.batch
    if len(tokens) - count < options.batch:
        reason = f"of {len(tokens)} sequences {count} are held out, which leaves less than a batch of {options.batch}"
        raise CalibrationDataError(reason=reason, remedy="Give more, or a smaller batch.")
    return tokens[-count:], tokens[:-count]


def _tune(
    scaled: ScaledModel, tokens: Tensor, held_out: Tensor, options: TuningOptions
) -> tuple[Scales, list[float], dict[int, float]]:
    """Return the best scales, the loss of every step, and by step the loss on what is held out."""
    starts = {key: scale.float() for key, scale in scaled.scales.items()}
    changes = {key: torch.zeros_like(scale) for key, scale in starts.items()}  # of logarithms: no scale turns negative
    optimizer = torch.optim.Adam(changes.values(), betas=BETAS)
    best, losses = scaled.scales, []
    measured = {0: _mean_divergence(scaled, best, held_out, options)}
    for step, batch in enumerate(track(list(batches(tokens, options.batch, options.steps, options.seed)), "scales"), 1):
        with torch.enable_grad(), fast_products():
            leaves = {key: change.requires_grad_() for key, change in changes.items()}
            loss = scaled.divergence({key: starts[key] * leaves[key].exp() for key in starts}, batch)
            for leaf, gradient in zip(leaves.values(), gradients_of(loss, list(leaves.values())), strict=True):
                leaf.grad = gradient
        optimizer.param_groups[0]["lr"] = cosine(options.rate, step - 1, options.steps)
        optimizer.step()
        losses.append(loss.item())
        if step % options.interval == 0 or step == options.steps:
            scales = {key: (starts[key] * changes[key].detach().exp()).to(scaled.scales[key].dtype) for key in starts}
            measured[step] = _mean_divergence(scaled, scales, held_out, options)
            if measured[step] == min(measured.values()):
                best = scales
    return best, losses, measured


@torch.no_grad()
def _mean_divergence(scaled: ScaledModel, scales: Scales, tokens: Tensor, options: TuningOptions) -> float:
    with fast_products():
        found = [scaled.divergence(scales, batch).item() for batch in tokens.split(options.batch)]
    return sum(found) / len(found)
