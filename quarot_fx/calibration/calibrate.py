"""``quarot_fx.calibrate``: rounds a model's weights one after another, on the inputs that really reach them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarot_fx.calibration.calibrated import forget, remember
from quarot_fx.calibration.data import Data, calibration_tokens
from quarot_fx.calibration.inputs import LayerInputs
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.products import shared_inputs
from quarot_fx.calibration.programs import capture_programs, device_of
from quarot_fx.calibration.report import CalibratedWeight, Calibration
from quarot_fx.calibration.rounding import round_weights
from quarot_fx.calibration.state import CalibrationState
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import NothingToCalibrateError
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_caches import QuantizeCaches
from quarot_fx.progress import track

OF_ACTIVATIONS = (QuantizeActivations, QuantizeCaches)
CHANGE_NO_CODE = {"nested_backend", "mode", "kernels", "check", "free_originals"}  # options that codes do not depend on


@torch.no_grad()
def calibrate(
    model: Callable[..., Any],
    data: Data,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 2048,
    gptq: GPTQOptions | Mapping[str, Any] | None = None,
    state: str | Path | None = None,
    offload: bool = False,
    **options: Any,
) -> Calibration:
    """Round the weights of a model by GPTQ; ``torch.compile`` and ``rewrite`` with the same options then use its codes.

    The model is captured and rotated as the backend does it, and run layer by layer on all sequences: each layer's
    weight is rounded on the inputs that it gets from the layers before, whose weights are rounded already. The model
    itself stays as it is. Codes are kept as long as its parameters, unchanged.

    Args:
        model: an ``nn.Module`` in eval mode that takes token ids [batch, length] first; it has to trace to one graph.
        data: token ids [n, length], or a list of such; a text file; or the name of a dataset: ``"wikitext2"``, ``"c4"``
            or one on the Hugging Face hub, ``"OWNER/NAME"`` or ``"OWNER/NAME:CONFIG"``, whose train split has a column
            ``text``.
        tokenizer: of a text, as transformers calls it.
        samples: windows that are drawn from a text.
        length: tokens in a window of a text.
        gptq: options of GPTQ, or a mapping of such.
        state: a folder that codes are saved in after every step, as safetensors with an index in JSON. If they are
            there already, calibration goes on after them.
        offload: keep activations on the CPU while they wait.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`; ``w_rounding`` is ``"gptq"`` unless given.

    Returns:
        What became of every weight; ``print`` shows it.

    Raises:
        CalibrationDataError: the data cannot be used.
        HessianError: a layer's inputs do not determine its Hessian, and damping is too small.
        CalibrationStateError: the folder holds another calibration's state.
        NothingToCalibrateError: no weight is rounded by calibration under these options.
        NotOneGraphError: the model has graph breaks, or no parameters.
        UnboundParameterError: a parameter is on the meta device.
    """
    start = time.perf_counter()
    config = QuarotConfig.from_options({"w_rounding": "gptq", **options})
    how = gptq if isinstance(gptq, GPTQOptions) else GPTQOptions.from_options(gptq)
    tokens = calibration_tokens(data, tokenizer, samples, length, config.seed).to(device_of(model))
    programs = capture_programs(model, tokens[:1], config, () if how.quantized_inputs else OF_ACTIVATIONS)
    groups = shared_inputs(programs.quantized.graph)
    if not groups:
        raise NothingToCalibrateError
    saved = None if state is None else CalibrationState(state, _settings(config, how, tokens))
    done = 0 if saved is None else len(saved)
    for group in groups:
        for product in group:
            forget(product.quantization)
    inputs = LayerInputs(programs, tokens, groups, how, offload)
    weights: list[CalibratedWeight] = []
    for step, group in enumerate(track(groups, "GPTQ")):
        nodes = [product.quantization for product in group]
        if done < len(groups):  # the layers that are still to come need their inputs
            inputs.advance(group)
        if saved is not None and step < done:
            codes, records = saved.load(step, nodes)
        else:
            codes, records = round_weights(group, inputs, how)
            if saved is not None:
                saved.save(nodes, codes, records)
        for node, one in zip(nodes, codes, strict=True):
            remember(node, one)
        inputs.release(group)
        weights += records
    seconds = time.perf_counter() - start
    return Calibration(tuple(weights), how, sequences=len(tokens), length=tokens.shape[1], seconds=seconds)


def _settings(config: QuarotConfig, options: GPTQOptions, tokens: Tensor) -> dict[str, Any]:
    """Return all that codes depend on besides the weights."""
    quantization = {name: value for name, value in asdict(config).items() if name not in CHANGE_NO_CODE}
    return {**quantization, **asdict(options), "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()}
