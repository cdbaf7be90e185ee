"""Pipelines: which passes run in which order, from text or from the options, with reports and checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quarot_fx.config import QuarotConfig
from quarot_fx.errors import CheckError, PipelineError, UnknownOptionError
from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.garbage import collected_rarely
from quarot_fx.passes.balance_keys import BalanceKeys
from quarot_fx.passes.base import Pass, pass_name
from quarot_fx.passes.compute_once import ComputeOnce
from quarot_fx.passes.fold_biases import FoldBiases
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.fold_means import FoldMeans
from quarot_fx.passes.fuse_appends import FuseAppends
from quarot_fx.passes.fuse_attention import FuseAttention
from quarot_fx.passes.fuse_float_linears import FuseFloatLinears
from quarot_fx.passes.fuse_gates import FuseGates
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.fuse_norm_linears import FuseNormLinears
from quarot_fx.passes.fuse_norms import FuseNorms
from quarot_fx.passes.fuse_packed_attention import FusePackedAttention
from quarot_fx.passes.fuse_ropes import FuseRopes
from quarot_fx.passes.fuse_rotations import FuseRotations
from quarot_fx.passes.lower_ops import LowerOps
from quarot_fx.passes.merge_counters import MergeCounters
from quarot_fx.passes.merge_int_linears import MergeIntLinears
from quarot_fx.passes.pair_appends import PairAppends
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_caches import QuantizeCaches
from quarot_fx.passes.quantize_embeddings import QuantizeEmbeddings
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.passes.recognize_experts import RecognizeExperts
from quarot_fx.passes.recognize_norms import RecognizeNorms
from quarot_fx.passes.rotate import Rotate
from quarot_fx.passes.simplify_attention import SimplifyAttention
from quarot_fx.passes.split_packed_linears import SplitPackedLinears
from quarot_fx.passes.unify_linears import UnifyLinears
from quarot_fx.program import Program

DEFAULT_ORDER: tuple[type[Pass], ...] = (
    RecognizeNorms,
    RecognizeExperts,
    UnifyLinears,
    SplitPackedLinears,  # before gains are folded: a packed weight's readers are its parts
    FoldBiases,  # before gains: a norm's bias stands between its gain and the linears
    FoldGains,
    FoldMeans,
    BalanceKeys,  # before rotations are placed: balanced keys are what is rotated
    PlaceRotations,
    Rotate,
    QuantizeWeights,
    QuantizeEmbeddings,
    QuantizeActivations,
    QuantizeCaches,
    FuseIntLinears,
    FuseFloatLinears,
    FuseGates,  # before products are merged: those of gate and up become one in an order of their own
    MergeIntLinears,
    FuseNorms,
    FuseNormLinears,
    FuseRotations,
    FuseRopes,
    SimplifyAttention,
    FuseAttention,
    FusePackedAttention,
    ComputeOnce,
    FuseAppends,  # the first that makes a graph write: nothing may be moved afterwards
    PairAppends,
    MergeCounters,
    LowerOps,
    FoldConstants,
)
QUANTIZING = (QuantizeWeights, QuantizeEmbeddings, QuantizeActivations, QuantizeCaches)
PASSES: dict[str, type[Pass]] = {pass_name(cls): cls for cls in DEFAULT_ORDER}


def parse_pipeline(text: str, config: QuarotConfig) -> list[Pass]:
    """Read a pipeline such as ``"fold-gains,place-rotations{seed=3},rotate"``.

    Options in braces replace those of the config for that pass.

    Raises:
        PipelineError: the text cannot be read.
        UnknownOptionError: there is no pass or option of that name.
    """
    if not re.fullmatch(r"\s*[\w-]+(\{[^{}]*\})?\s*(,\s*[\w-]+(\{[^{}]*\})?\s*)*", text):
        raise PipelineError(pipeline=text, reason='write it as "pass,pass{option=value option=value},pass"')
    passes = []
    for name, braces in re.findall(r"([\w-]+)(\{[^{}]*\})?", re.sub(r"\s*(,)\s*", r"\1", text.strip()) + ","):
        if name not in PASSES:
            raise UnknownOptionError("pass", name, PASSES)
        passes.append(PASSES[name](replace(config, **_options(braces))))
    return passes


def _options(braces: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    known = set(QuarotConfig.__dataclass_fields__)
    for item in braces.strip("{}").split():
        name, _, value = item.partition("=")
        if name not in known:
            raise UnknownOptionError("option", name, known)
        options[name] = _literal(value)
    return options


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build_pipeline(config: QuarotConfig) -> list[Pass]:
    """Return the passes that a config asks for: its pipeline, cut short by ``stop_after``, less the disabled ones.

    ``fold-constants`` always comes last, so that whatever weights were rewritten are computed before the graph runs.

    Raises:
        PipelineError: a pass comes before one that it requires.
        UnknownOptionError: a name is not that of a pass.
    """
    names = {name for name in (config.stop_after, *config.disabled_passes) if name is not None}
    for name in sorted(names - set(PASSES)):
        raise UnknownOptionError("pass", name, PASSES)
    passes = parse_pipeline(config.pipeline, config) if config.pipeline else [cls(config) for cls in DEFAULT_ORDER]
    check_order(passes)
    if config.stop_after:
        ends = [place for place, p in enumerate(passes) if p.name == config.stop_after]
        if not ends:
            raise PipelineError(pipeline=config.pipeline, reason=f"stop_after={config.stop_after!r} is not in it")
        passes = passes[: ends[-1] + 1]
    passes = [p for p in passes if p.name not in config.disabled_passes and not isinstance(p, FoldConstants)]
    return [*passes, FoldConstants(config)]


def split_at_quantization(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """Return the passes before the first one that quantises, and from there on those up to the last one that does."""
    places = [place for place, one in enumerate(passes) if isinstance(one, QUANTIZING)] or [len(passes)]
    return list(passes[: places[0]]), list(passes[places[0] : places[-1] + 1])


def check_order(passes: Sequence[Pass]) -> None:
    """Raise :class:`PipelineError` if a pass comes before one that it requires."""
    names = [p.name for p in passes]
    for place, one in enumerate(passes):
        for required in one.requires:
            if required in names[place + 1 :] and required not in names[:place]:
                raise PipelineError(pipeline=",".join(names), reason=f"{one.name} must come after {required}")


@collected_rarely()
def run_pipeline(program: Program, passes: Sequence[Pass], check_inputs: Sequence[Any] | None = None) -> Program:
    """Run passes on a copy of a program and return it.

    Args:
        program: left as it is.
        passes: what to run, in order; passes of your own may stand between ours.
        check_inputs: inputs to run before and after every pass in float64 (``check=True``).

    Raises:
        CheckError: a pass changed the output by more than its tolerance.
    """
    state = Program.of(program)
    before = run_in_float64(state.graph_module, *check_inputs) if check_inputs is not None else None
    before_it = "pipeline='fold-constants'"  # which changes nothing in a captured graph
    for one in passes:
        report = one.apply(state)
        if check_inputs is not None and before is not None:
            after = run_in_float64(state.graph_module, *check_inputs, known=state.known)
            report.difference = relative_difference(after, before)
            if one.tolerance is not None and not report.difference <= one.tolerance:
                raise CheckError(stage=one.name, difference=report.difference, limit=one.tolerance, before=before_it)
            before = after
        before_it = f"stop_after={one.name!r}"
    return state
