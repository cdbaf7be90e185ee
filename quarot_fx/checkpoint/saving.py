"""``quarot_fx.save``: everything that compilation makes of a model's weights, written to a folder."""

from __future__ import annotations

import importlib
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

import quarot_fx
from quarot_fx.binding import compiled_graphs
from quarot_fx.capture import Captured
from quarot_fx.checkpoint.balances import write_balances
from quarot_fx.checkpoint.learned import write_learned
from quarot_fx.checkpoint.manifest import DTYPE_NAMES, Codes, Manifest, ModelTensor, Value
from quarot_fx.checkpoint.saved import origin_of
from quarot_fx.checkpoint.shards import ShardWriter, commit
from quarot_fx.checkpoint.skeleton import describe, example_inputs, write_configs
from quarot_fx.config import OF_THE_RUN, QuarotConfig
from quarot_fx.errors import OptionError, SaveError
from quarot_fx.garbage import collected_rarely
from quarot_fx.graph import parameters_of, stored_tensor, with_sources
from quarot_fx.inspection import Inputs, capture_graphs
from quarot_fx.passes.fold_constants import FoldConstants, constants_to_fold, folded_value, read_as_they_are
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.program import Program
from quarot_fx.store import SHARED, expression, free

quarot = torch.ops.quarot
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@collected_rarely()
@torch.no_grad()
def save(
    model: torch.nn.Module,
    folder: str | Path,
    inputs: Inputs | None = None,
    *,
    free_originals: bool = False,
    max_shard_size: int | str = "2GB",
    **options: Any,
) -> None:
    """Write what ``torch.compile(model, backend="quarot", options=options)`` makes of a model's weights to a folder.

    Weights are rotated and quantised one after another, and each is on its way to the disk before the next is touched.
    A checkpoint that is in the folder already is replaced at the end, in one step. It does not depend on the device,
    nor on the kernels that will read it.

    Args:
        model: an ``nn.Module`` in evaluation mode, or what ``torch.compile`` made of one.
        folder: is made if it is not there.
        inputs: example inputs to trace the model with, as for :func:`quarot_fx.rewrite`. Not needed for a causal
            language model of transformers, nor if the model was compiled and called in this process: then the graphs
            that there are are saved, with their options.
        free_originals: release each weight as soon as what is made of it is written; then only the checkpoint is left.
        max_shard_size: of a file, in bytes or as text: ``"500MB"``.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`; for a model that was loaded, those of its
            checkpoint are the default.

    Raises:
        SaveError: there is no graph to save, or the folder holds other weights.
        OptionError: an option, or ``max_shard_size``, has a value that it cannot have.
        OriginalsFreedError: the model's weights were freed, and what is left of them is not enough.
        UnboundParameterError: the model is on the meta device, or quantised already.
    """
    writer = ShardWriter(Path(folder), _bytes(max_shard_size))
    model = getattr(model, "_orig_mod", model)
    names = _Names(model, str(folder))
    graphs, config = _graphs(model, inputs, options, names)
    constants = _Constants(names)
    for captured, parameters in graphs:
        captured.check_has_data(parameters)  # type: ignore[arg-type]
        constants.collect(_planned(captured, parameters, config))
    held = names.unconsumed(constants)
    stored = {name: writer.add(name, names.tensors[name]) for name in held}
    values, codes = constants.write(writer, free_originals, held)
    learned, balances = write_learned(config, writer), write_balances(config, writer)
    writer.finish()
    manifest = Manifest(
        versions=_versions(),
        model_class=type(model).__qualname__,
        transformers=describe(model),
        options=config.of_weights().as_options(),
        plan=constants.plan,
        model={
            name: ModelTensor(DTYPE_NAMES[one.dtype], tuple(one.shape), tuple(one.stride()), stored.get(name))
            for name, one in names.tensors.items()
        },
        tied=names.tied,
        values=tuple(values),
        codes=tuple(codes),
        learned=learned,
        balances=balances,
        tensors=writer.tensors,
        shards=writer.shards,
    )
    write_configs(model, config, Path(folder))
    commit(Path(folder), manifest)


class _Names:
    """The names of a model's parameters and buffers.

    Attributes:
        tensors: by the first of their names.
        tied: other names -> the first.
    """

    def __init__(self, model: torch.nn.Module, folder: str) -> None:
        self._folder = folder
        self._of: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.tied: dict[str, str] = {}
        parameters = model.named_parameters(remove_duplicate=False)
        for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
            first = self._of.setdefault(id(tensor), name)
            if first == name:
                self.tensors[name] = tensor
            else:
                self.tied[name] = first

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._of

    def of(self, node: fx.Node) -> list[str]:
        """Return the names of what a constant is made of.

        Raises:
            SaveError: it is made of something that has none.
        """
        leaves = expression(node).leaves
        if any(leaf not in self for leaf in leaves):
            remedy = "Register all that its forward computes with as parameters or buffers."
            reason = f"it computes with a tensor that is neither a parameter nor a buffer of it: {parameters_of(node)}"
            raise SaveError(folder=self._folder, reason=reason, remedy=remedy)
        return [self._of[id(leaf)] for leaf in leaves]

    def unconsumed(self, constants: _Constants) -> list[str]:
        """Return the names of what has to be stored as it is: all but what only constants are made of."""
        consumed = constants.consumed - constants.live
        return [name for name, tensor in self.tensors.items() if name not in consumed or not tensor.is_floating_point()]


@dataclass
class _Constants:
    """The constants of all graphs, each once, and what they are made of."""

    names: _Names
    plan: Mapping[str, Any] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    live: set[str] = field(default_factory=set)
    _found: dict[tuple[str, ...], tuple[Program, fx.Node]] = field(default_factory=dict)

    def collect(self, program: Program) -> None:
        """Add those of a graph."""
        self.plan = self.plan or ({} if program.plan is None else program.plan.as_dict())
        folded = constants_to_fold(program.graph)
        for node in folded:
            for one in _saved_nodes(node):
                names = self.names.of(one)
                self._found.setdefault(expression(one).text(names), (program, one))
                self.consumed.update(names)
        for node in read_as_they_are(program.graph, folded):
            if stored_tensor(node) in self.names:
                self.live.update(self.names.of(node))

    def write(self, writer: ShardWriter, frees: bool, held: list[str]) -> tuple[list[Value], list[Codes]]:
        """Evaluate and write every constant, and free what is needed for no other."""
        readers = Counter(name for _, node in self._found.values() for name in self.names.of(node))
        values, codes = [], []
        for how, (program, node) in self._found.items():
            if node.target is quarot.quantize_weight.default:
                codes.append(_write_codes(writer, how, program, node))
            else:
                name = writer.add(f"{parameters_of(node)[0]}.folded", folded_value(program, node))
                values.append(Value(how, name))
            program.known.pop(node, None)
            names = self.names.of(node)
            readers.subtract(names)
            if frees:
                for name in names:
                    if not readers[name] and name not in held:
                        free(self.names.tensors[name], name)
        return values, codes


def _saved_nodes(node: fx.Node) -> list[fx.Node]:
    """Return what to save of a constant: the quantised weights that it is made of, or itself if there are none."""
    quantized = [one for one in with_sources(node) if one.target is quarot.quantize_weight.default]
    return quantized or [node]


def _write_codes(writer: ShardWriter, how: tuple[str, ...], program: Program, node: fx.Node) -> Codes:
    """Write the results of a ``quarot::quantize_weight`` node, from the constants that graphs hold where they do."""
    _, bits, *_ = node.args
    parts = {part.args[1]: part for part in node.users if part.target is operator.getitem}
    packed = next(user for user in parts[0].users if user.target is quarot.pack.default)
    name = parameters_of(node)[0]
    return Codes(
        how,
        writer.add(f"{name}.codes", folded_value(program, packed)),
        writer.add(f"{name}.scale", folded_value(program, parts[1])),
        writer.add(f"{name}.zero", folded_value(program, parts[2])) if 2 in parts else None,
        bits,  # type: ignore[arg-type]
        parts[0].meta["val"].shape[-1],
    )


def _planned(captured: Captured, parameters: Mapping[int, torch.Tensor], config: QuarotConfig) -> Program:
    """Rewrite a graph without kernels, whose layouts depend on a device, and without folding its constants."""
    passes = [one for one in build_pipeline(config) if not isinstance(one, FoldConstants)]
    return run_pipeline(captured.bind(parameters, SHARED), passes)  # type: ignore[arg-type]


def _graphs(
    model: torch.nn.Module, inputs: Inputs | None, options: Mapping[str, Any], names: _Names
) -> tuple[Sequence[tuple[Captured, Mapping[int, torch.Tensor]]], QuarotConfig]:
    """Return graphs of a model, with their parameters by place, and the config that they are rewritten with."""
    for name in options.keys() & set(OF_THE_RUN):
        raise OptionError(name=name, value=options[name], reason="changes no weight; give it to load")
    origin = next((found for tensor in names.tensors.values() if (found := origin_of(tensor))), None)
    made_with = origin.config.as_options() if origin and not options else options
    wanted = QuarotConfig.from_options({**made_with, "kernels": "none"})
    if inputs is None:
        compiled = [(graph, bound) for graph in compiled_graphs() for bound in graph.bound_parameters()]
        ours = [(graph, bound) for graph, bound in compiled if any(one in names for one in bound.values())]
        configs = {graph.config.of_weights() for graph, _ in ours}
        if not options and len(configs) == 1:
            wanted = replace(next(iter(configs)), kernels="none")
        fitting = [(g.captured, bound) for g, bound in ours if g.config.of_weights() == wanted.of_weights()]
        if fitting:
            return fitting, wanted
        if ours and not options:
            reason = f"it is compiled with {len(configs)} different sets of options"
            raise SaveError(folder=names._folder, reason=reason, remedy="Give the options that it is to be saved with.")
    examples = example_inputs(model) if inputs is None else [inputs]
    if not examples:
        reason = "it was not compiled and called with these options in this process"
        raise SaveError(folder=names._folder, reason=reason, remedy="Give example inputs.")
    captured = [
        (one, dict(enumerate(arguments))) for example in examples for one, arguments in capture_graphs(model, example)
    ]
    if not captured:
        remedy = "Give a model whose forward uses its parameters."
        raise SaveError(folder=names._folder, reason="it has no graph with parameters", remedy=remedy)
    return captured, wanted


def _versions() -> dict[str, str]:
    versions = {"quarot_fx": quarot_fx.__version__, "torch": torch.__version__}
    try:
        return {**versions, "transformers": importlib.import_module("transformers").__version__}
    except ImportError:
        return versions


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B|)", str(size).strip().upper())
    if match is None or int(match[1]) == 0:
        raise OptionError(name="max_shard_size", value=size, reason="must be a number of bytes, or such as '500MB'")
    return int(match[1]) * _UNITS[match[2]]
