"""Every mistake that a user can make has a class of its own here, with its place and its remedy in the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class QuarotError(Exception):
    """Base of all errors that quarot_fx raises on purpose.

    A subclass states its message once, as a template; what it was raised with stays readable as
    attributes (``error.name``, ``error.parameter``), so that programs need not parse text.
    """

    template: ClassVar[str] = "{reason}"

    def __init__(self, **details: Any) -> None:
        self.__dict__.update(details)
        super().__init__(self.template.format(**details))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint ``" Did you mean 'x'?"`` for the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


# -- options ---------------------------------------------------------------------------------------


class OptionError(QuarotError, ValueError):
    """An option has a value that it cannot have."""

    template = "option {name}={value!r}: {reason}"


class UnknownOptionError(QuarotError, ValueError):
    """An option, mode, pass or override key that does not exist."""

    template = "unknown {kind} {name!r}.{hint} Known: {known}."

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        super().__init__(kind=kind, name=name, hint=nearest(name, known), known=", ".join(known))


class GroupSizeError(QuarotError, ValueError):
    """A quantisation group does not divide the axis that it is to split."""

    template = (
        "{option}={group} does not divide the {size} elements that {where} has on the quantised axis. "
        "Choose a divisor of {size}, or leave {option} unset for one group."
    )


class HadamardOrderError(QuarotError, ValueError):
    """No construction of a Hadamard matrix of this order is known here."""

    template = (
        "no Hadamard matrix of order {order}: it is neither 1, 2, Paley's q + 1 or 2 (q + 1), nor a product of such. "
        "kronecker_factors({order}) returns the closest orthogonal matrix."
    )


class RotationSizeError(QuarotError, ValueError):
    """A rotation does not fit the axis that it is applied to."""

    template = (
        "rotation {rotation} does not fit axis {dim} of shape {shape}: its size must be a multiple of "
        "order x inner = {order} x {inner}."
    )


class NotOrthogonalError(QuarotError, ValueError):
    """A matrix that is to be a rotation is none."""

    template = "this matrix is no rotation: {reason}. Give an orthogonal matrix, in float32 or float64."


class UnknownMatrixError(QuarotError, LookupError):
    """A graph names a rotation by a given matrix, and this process has not got the matrix."""

    template = (
        "the matrix of {rotation} is not known in this process: it was learned in another one. Load what "
        "quarot_fx.LearnedRotations.save wrote there, or the checkpoint, before the graph runs."
    )


class BalanceSizeError(QuarotError, ValueError):
    """Matrices that balance keys do not fit what they are applied to."""

    template = (
        "{balance} does not fit shape {shape}: it is for heads of size {size}, {heads} of them or a multiple. Find "
        "it for this model."
    )


class NotABalanceError(QuarotError, ValueError):
    """Matrices that are to balance keys cannot."""

    template = "these matrices balance nothing: {reason}. Give a positive definite one for each head, in float64."


class UnknownBalanceError(QuarotError, LookupError):
    """A graph or a cache names matrices that balance keys, and this process has not got them."""

    template = (
        "the matrices of {name} are not known in this process: calibration found them in another one. Load what "
        "quarot_fx.KeyBalances.save wrote there, or the checkpoint, before the graph runs."
    )


class PipelineError(QuarotError, ValueError):
    """A pipeline whose passes are in an order in which they cannot work, or whose text cannot be read."""

    template = "pipeline {pipeline!r}: {reason}"


# -- the user's model ------------------------------------------------------------------------------


class TrainingModeError(QuarotError):
    """The model is in training mode."""

    template = "{where} is in training mode, and quarot compiles for inference only. Call model.eval() first."


class InputRequiresGradError(QuarotError):
    """An input of the compiled model requires grad."""

    template = (
        "input {name!r} requires grad, and a quantised graph has no backward. "
        "Call the model under torch.no_grad() or detach the input."
    )


class NonFiniteWeightError(QuarotError):
    """A parameter holds NaN or infinity."""

    template = (
        "parameter {parameter!r} has {count} element(s) that are NaN or infinite; rotating it would spread them "
        "over whole rows. Repair the checkpoint."
    )


class UnboundParameterError(QuarotError):
    """A parameter without data that can be read: on the meta device, already quantised, or an inference tensor."""

    template = "parameter {parameter!r} {reason}. {remedy}"


class OriginalsFreedError(QuarotError):
    """A weight is needed whose original was freed on request, or never loaded."""

    template = (
        "parameter {parameter!r} {how} and is needed again: {reason}. "
        "Compile the original model with free_originals=False, or reload it."
    )


# -- the KV cache ----------------------------------------------------------------------------------


class CacheModelError(QuarotError, ValueError):
    """A model, or its config, that this kind of cache does not serve."""

    template = "no such cache for {what}: {reason}. {remedy}"


class CacheFullError(QuarotError, ValueError):
    """More tokens came than a cache has room for."""

    template = (
        "{where} holds {length} of at most {capacity} tokens, and {tokens} more came. Make the cache with "
        "max_cache_len={needed} or more, or without max_cache_len, so that it grows."
    )


class CacheInputError(QuarotError, ValueError):
    """Keys or values that differ in batch, heads, size or dtype from those that a cache was made for."""

    template = (
        "{where} are {given}, and the cache was made for {made}. Use a cache of its own for each model and batch size; "
        "beams and returned sequences count as sequences of the batch."
    )


class CropError(QuarotError, ValueError):
    """Tokens that cannot be taken back from a cache."""

    template = "cannot take back {tokens} tokens from {where}: {reason}."


class OffloadError(QuarotError):
    """A cache whose tensors have fixed addresses was to move to the CPU."""

    template = (
        "{where} cannot be offloaded: compiled graphs hold the addresses of its tensors. Make the cache without "
        "max_cache_len."
    )


# -- calibration -----------------------------------------------------------------------------------


class NotCalibratedError(QuarotError):
    """A weight is to be rounded by calibration, and there was none for this form of it."""

    template = (
        "weight {parameter!r} is to be rounded by {how}, and no calibration has rounded it as it is "
        "rotated and quantised here. Call quarot_fx.calibrate(model, data, ...) with the same options before, and then "
        "quarot_fx.tune_scales if its scales are to be tuned."
    )


class ClipNotCalibratedError(QuarotError):
    """A clip ratio is to be found by calibration, and is not known."""

    template = (
        "{option}={value!r} of {where} is a ratio that calibration finds. Call calibration = "
        "quarot_fx.calibrate(model, data, ...) with the same options before, and give calibration.options to the "
        "backend: the ratios are there."
    )


class NothingToCalibrateError(QuarotError, ValueError):
    """Calibration was asked for, and nothing of the model depends on it."""

    template = (
        "the model has nothing to calibrate: under these options no linear layer is quantised with w_rounding='gptq', "
        "w_clip='output' or a_clip='output'. quarot_fx.explain(model, inputs, ...) says why not."
    )


class BitsBudgetError(QuarotError, ValueError):
    """A budget of bits that no choice of widths meets."""

    template = "bits_budget={budget:g} cannot be met: {reason}. {remedy}"


class HessianError(QuarotError, ArithmeticError):
    """The Hessian of a weight has no Cholesky factor."""

    template = (
        "the Hessian of {parameter!r} ({size} inputs, {tokens} tokens) is not positive definite with damping="
        "{damping:g}: {reason}. {remedy}"
    )


class CalibrationDataError(QuarotError, ValueError):
    """Calibration data of a form that cannot be used."""

    template = "cannot calibrate on this data: {reason}. {remedy}"


class CalibrationStateError(QuarotError, ValueError):
    """A folder holds the state of another calibration than the one that is to be resumed."""

    template = "cannot resume the calibration in {folder!r}: {reason}. Give an empty folder, or the same arguments."


# -- learned rotations -----------------------------------------------------------------------------


class LearnedRotationError(QuarotError, ValueError):
    """A rotation that was learned cannot be used for this graph."""

    template = "the rotation that was learned for {what} cannot be used: {reason}. {remedy}"


class LearnedRotationsFileError(QuarotError, ValueError):
    """A folder of learned rotations that is none, or not what was written."""

    template = "cannot load the learned rotations in {folder!r}: {reason}. {remedy}"


class KeyBalanceNotCalibratedError(QuarotError, ValueError):
    """Keys are to be balanced by matrices that are still to be found."""

    template = (
        "key_balance='search' is for calibration, which has not run. Call quarot_fx.calibrate(model, data, ...) with "
        "these options, and give the backend those that it returns."
    )


class KeyBalancesFileError(QuarotError, ValueError):
    """A folder of balances of keys that is none, or not what was written."""

    template = "cannot load the balances of keys in {folder!r}: {reason}. Give a folder that KeyBalances.save wrote."


class NothingToLearnError(QuarotError, ValueError):
    """Rotations were to be learned, and no weight absorbs one."""

    template = (
        "the model has no rotation to learn: {reason}. quarot_fx.explain(model, inputs, ...) says what is rotated, and "
        "why."
    )


class NothingToTuneError(QuarotError, ValueError):
    """Scales of weights were to be tuned, and there are none."""

    template = (
        "the model has no scales to tune: under these options no linear layer's weight is quantised. "
        "quarot_fx.explain(model, inputs, ...) says what is quantised, and why."
    )


class LearningError(QuarotError):
    """Nothing could be learned on this model."""

    template = "cannot learn on this model: {reason}. {remedy}"


# -- checkpoints -----------------------------------------------------------------------------------


class SaveError(QuarotError, ValueError):
    """A model that cannot be saved, or a folder that cannot be saved to."""

    template = "cannot save to {folder!r}: {reason}. {remedy}"


class CheckpointError(QuarotError):
    """Base of what can be wrong with a checkpoint that is loaded."""

    template = "cannot load the checkpoint in {folder!r}: {reason}. {remedy}"


class CheckpointNotFoundError(CheckpointError, LookupError):
    """A folder without a checkpoint of ours."""


class CheckpointFormatError(CheckpointError, ValueError):
    """An index that says something else than an index can say."""


class CheckpointVersionError(CheckpointError, ValueError):
    """A checkpoint in a format of another version."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """A shard that is missing, cut short or not what was written."""


class ArchitectureError(CheckpointError, ValueError):
    """A checkpoint of another model than the one that it is to be loaded into."""


class CheckpointOptionError(CheckpointError, ValueError):
    """Options that contradict those that a checkpoint was made with."""


class NotInCheckpointError(CheckpointError, LookupError):
    """A graph needs a weight in a form that its checkpoint does not hold."""

    template = (
        "the checkpoint in {folder!r} does not hold {parameter!r} in the form that this graph needs: {wanted}. "
        "It holds: {held}. Compile with the options that it was made with, {options}, or save it again from the "
        "original model, with inputs of the kind that this graph gets among those it is saved with."
    )


class RotationNotAbsorbedError(QuarotError, ValueError):
    """A model whose weights alone cannot absorb a rotation."""

    template = "the weights of this model cannot absorb a rotation alone: {reason}. {remedy}"


# -- the command line ------------------------------------------------------------------------------


class MissingExtraError(QuarotError, ImportError):
    """A package that only an extra of quarot-fx installs is missing."""

    template = "this needs the package {package!r}, which is not installed. Run: pip install 'quarot-fx[{extra}]'"


class NoGPUError(QuarotError):
    """A command that measures a GPU found none."""

    template = "this measures an NVIDIA GPU, and PyTorch sees none. Run it where torch.cuda.is_available() is True."


class NotFoundError(QuarotError, LookupError):
    """A model, tokenizer or text that the command line was given does not exist."""

    template = "found no {kind} {name!r}. {remedy}"


class NotCausalLMError(QuarotError, ValueError):
    """A config that belongs to no causal language model."""

    template = (
        "{name!r} is the config of a {model_type!r}, for which transformers has no causal language model. "
        "Give the config of a decoder."
    )


# -- the compiler ----------------------------------------------------------------------------------


class CaptureError(QuarotError):
    """A graph could not be captured; raised so that Dynamo reports it instead of breaking the graph."""

    template = "quarot could not capture this graph, at {where}: {reason}"


class NestedBackendError(QuarotError):
    """The compiler that got the rewritten graph failed on it."""

    template = (
        "the nested backend {name!r} failed on the rewritten graph: {reason}. "
        "nested_backend='eager' runs the same graph without compiling it."
    )


class GraphInputError(QuarotError, TypeError):
    """An FX graph was given without what it takes to read it: example inputs, or weights that belong to it."""

    template = "cannot rewrite this FX graph: {reason}. {remedy}"


class NotOneGraphError(QuarotError):
    """``rewrite`` or ``explain`` was asked for one graph, and the model has another number of them."""

    template = (
        "the model traces to {count} graphs that hold parameters, not to one, so there is no single rewritten graph "
        "to return. {hint}"
    )


class CheckError(QuarotError):
    """A stage that must not change the model's output changed it (``check=True``)."""

    template = (
        "the stage {stage!r} changed the output by {difference:.1e} (relative; {limit:.0e} allowed). "
        "Disable it with disabled_passes=({stage!r},) and please report the graph: "
        "quarot_fx.rewrite(model, inputs, {before}).print_readable()"
    )
