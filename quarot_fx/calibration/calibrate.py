"""``quarot_fx.calibrate``: rounds a model's weights one after another, on the inputs that really reach them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarot_fx.calibration.activation_clips import search_input_clips, use_input_clips
from quarot_fx.calibration.bits import Budget, Once, choose_bits, chosen_overrides
from quarot_fx.calibration.cache_clips import search_cache_clip, use_cache_clip
from quarot_fx.calibration.calibrated import forget, remember
from quarot_fx.calibration.data import Data, calibration_tokens
from quarot_fx.calibration.inputs import LayerInputs
from quarot_fx.calibration.key_balance import find_key_balances
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.products import Product, shared_inputs
from quarot_fx.calibration.programs import Programs, capture_programs, device_of
from quarot_fx.calibration.report import BalancedKeys, CalibratedCaches, Calibration, ChosenBits
from quarot_fx.calibration.rounding import round_weights
from quarot_fx.calibration.state import CalibrationState, Step
from quarot_fx.config import SEARCH, SEARCHED_CLIPS, QuarotConfig
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
    bits_budget: float | None = None,
    bits_choices: Sequence[int] = (4, 8),
    **options: Any,
) -> Calibration:
    """Round the weights of a model by GPTQ, and find clip ratios; ``torch.compile`` and ``rewrite`` with the options of
    the result then use them.

    The model is captured and rotated as the backend does it, and run layer by layer on all sequences: each layer is
    calibrated on the inputs that it gets from the layers before, whose weights are rounded already. The model itself
    stays as it is. Codes are kept as long as its parameters, unchanged.

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
        bits_budget: bits of a weight, with its share of scales and zero points, that all linear layers that are
            quantised are to have on average. The widths of layers are then chosen so that the model's predictions
            change least; those that overrides give stay.
        bits_choices: the widths that there are to choose from.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`; ``w_rounding`` is ``"gptq"`` unless given.
            Clip ratios are searched for where ``w_clip`` or ``a_clip`` is ``"output"``, and where ``k_clip`` or
            ``v_clip`` is ``"search"``; keys are balanced where ``key_balance`` is.

    Returns:
        What became of every weight and every input; ``print`` shows it. ``calibration.options`` is for the backend.

    Raises:
        CalibrationDataError: the data cannot be used.
        HessianError: a layer's inputs do not determine its Hessian, and damping is too small.
        CalibrationStateError: the folder holds another calibration's state.
        BitsBudgetError: the budget is too small.
        OptionError: ``w_rounding`` is what :func:`quarot_fx.tune_scales` finds afterwards.
        NothingToCalibrateError: no weight is rounded by calibration under these options.
        NotOneGraphError: the model has graph breaks, or no parameters.
        UnboundParameterError: a parameter is on the meta device.
    """
    start = time.perf_counter()
    config = QuarotConfig.from_options({"w_rounding": "gptq", **options})
    config.check_not_tuned()
    how = gptq if isinstance(gptq, GPTQOptions) else GPTQOptions.from_options(gptq)
    budget = None if bits_budget is None else Budget(bits_budget, tuple(bits_choices))
    tokens = calibration_tokens(data, tokenizer, samples, length, config.seed).to(device_of(model))
    without = () if how.quantized_inputs else OF_ACTIVATIONS
    saved = None if state is None else CalibrationState(state, _settings(config, how, tokens, budget), model)
    keys: tuple[BalancedKeys, ...] = ()
    if config.key_balance == SEARCH:
        find = partial(find_key_balances, model, tokens, offload)
        balances, keys = find() if saved is None else saved.balances(find)
        config = config.with_options({"key_balance": balances})
    programs = capture_programs(model, tokens[:1], config, without)
    once: Once = _without_state if saved is None else saved.once
    bits: tuple[ChosenBits, ...] = ()
    if budget is not None:
        bits = choose_bits(programs, tokens, config, budget, offload, once)
        config = config.with_overrides(chosen_overrides(config, bits))
        programs = programs.quantized_by(config, without)
    caches = []
    for kind in ("key", "value"):
        if getattr(config, f"{kind[0]}_clip") in SEARCHED_CLIPS["kv_clip"]:
            caches.append(_search_cache_clip_once(kind, programs, tokens, config, offload, once))
            use_cache_clip(programs, caches[-1])
            config = config.with_options({f"{kind[0]}_clip": caches[-1].clip})
    groups = shared_inputs(programs.quantized.graph, programs.searched)
    if not groups and not caches and not keys and not bits:
        raise NothingToCalibrateError
    found = _calibrate_groups(groups, LayerInputs(programs, tokens, groups, how, offload), how, saved)
    clipped = [one for step in found for one in step.inputs]
    clips = {parameter: {"a_clip": one.clip} for one in clipped for parameter in one.parameters}
    return Calibration(
        options=config.with_overrides(clips).of_weights().as_options(),
        weights=tuple(weight for step in found for weight in step.weights),
        inputs=tuple(clipped),
        caches=tuple(caches),
        keys=keys,
        bits=bits,
        gptq=how,
        sequences=len(tokens),
        length=tokens.shape[1],
        seconds=time.perf_counter() - start,
    )


def _search_cache_clip_once(
    kind: str, programs: Programs, tokens: Tensor, config: QuarotConfig, offload: bool, once: Once
) -> CalibratedCaches:
    def search() -> dict[str, Any]:
        return asdict(search_cache_clip(kind, programs, tokens, config, offload))

    return CalibratedCaches(**once(f"clip ratio of {kind}s", search))


def _without_state(_: str, answer: Callable[[], Any]) -> Any:
    return answer()


def _calibrate_groups(
    groups: Sequence[Sequence[Product]], inputs: LayerInputs, options: GPTQOptions, saved: CalibrationState | None
) -> list[Step]:
    """Calibrate groups one after another, but for those that are saved already; graphs use the codes from then on."""
    done = 0 if saved is None else len(saved)
    for group in groups:
        for product in group:
            if product.quantization is not None:
                forget(product.quantization)
    found: list[Step] = []
    for number, group in enumerate(track(groups, "calibration")):
        nodes = [product.quantization or product.weight for product in group]
        if saved is not None and number < done:
            step = saved.load(number, nodes)
            use_input_clips(group, step.inputs)
            if done < len(groups):  # the layers that are still to come need their inputs
                inputs.advance(group)
        else:
            step = _calibrate_group(group, inputs, options)
            if saved is not None:
                saved.save(nodes, step)
        quantizations = [product.quantization for product in group if product.quantization is not None]
        for node, codes in zip(quantizations, step.codes, strict=True):
            remember(node, codes)
        inputs.release(group)
        found.append(step)
    return found


def _calibrate_group(group: Sequence[Product], inputs: LayerInputs, options: GPTQOptions) -> Step:
    """Run the model up to a group, find clip ratios of its input, and round its weights on what these make of it."""
    weights = [product.matrices() for product in group]
    inputs.advance_to_source(group)
    clips = search_input_clips(group, weights, inputs)
    use_input_clips(group, clips)
    inputs.advance(group)
    codes, records = round_weights(group, weights, inputs, options)
    return Step(codes, records, clips)


def _settings(config: QuarotConfig, options: GPTQOptions, tokens: Tensor, budget: Budget | None) -> dict[str, Any]:
    """Return all that codes depend on besides the weights."""
    bits = {} if budget is None else {"bits_budget": budget.bits, "bits_choices": list(budget.choices)}
    quantization = {name: value for name, value in asdict(config).items() if name not in CHANGE_NO_CODE}
    return {
        **quantization,
        **asdict(options),
        **bits,
        "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
    }
