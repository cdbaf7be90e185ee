"""Norms in every spelling become what they are in any basis: a length, and the removal of one direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quarot_fx.graph import Inserter, is_float, module_path, value
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class RecognizeNorms(Pass):
    """``mean(x^2) -> mean_square(x)``; ``x - mean(x) -> x - (x.u) u`` with ``u = 1/sqrt(n)``; layer_norm and rms_norm
    are written out with these, ``y = (x - (x.u) u) / sqrt(mean_square + eps) * gain + bias`` (QuaRot, section 3.1).
    """

    def run(self, program: Program, report: PassReport) -> None:
        graph = program.graph
        for node in list(graph.nodes):
            target = str(node.target)
            if target == "aten.layer_norm.default":
                _write_out(graph, node, self.name, report, centred=True)
            elif target == "aten.rms_norm.default":
                _write_out(graph, node, self.name, report, centred=False)
            elif target in ("aten.mean.dim", "aten.sum.dim_IntList"):
                _recognize_mean(graph, node, self.name, report)


def _is_last_axis(dims: object, source: fx.Node) -> bool:
    ndim = source.meta["val"].ndim
    return isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] % ndim == ndim - 1


def _recognize_mean(graph: fx.Graph, node: fx.Node, author: str, report: PassReport) -> None:
    source = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else None
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if not isinstance(source, fx.Node) or not is_float(source) or not _is_last_axis(dims, source):
        return
    size = source.meta["val"].shape[-1]
    if not isinstance(size, int):
        return
    squared = _squared(source)
    insert = Inserter(graph, author, node)
    with graph.inserting_before(node):
        if squared is not None:
            new = insert.call(quarot.mean_square.default, squared)
            if node.kwargs.get("dtype") is not None:
                new = insert.call(aten.to.dtype, new, node.kwargs["dtype"])
            if str(node.target) == "aten.sum.dim_IntList":
                new = insert.call(aten.mul.Tensor, new, size)
            if not keepdim:
                new = insert.call(aten.squeeze.dim, new, -1)
            node.replace_all_uses_with(new)
            report.matched += 1
            return
    if str(node.target) == "aten.mean.dim" and keepdim:
        for user in list(node.users):
            if str(user.target) == "aten.sub.Tensor" and user.args == (source, node) and not user.kwargs:
                _centre(graph, user, source, author, report)


def _squared(node: fx.Node) -> fx.Node | None:
    """Return x if the node is ``x^2`` in some spelling."""
    target = str(node.target)
    if target == "aten.pow.Tensor_Scalar" and node.args[1] == 2:
        return node.args[0]  # type: ignore[return-value]
    if target == "aten.square.default":
        return node.args[0]  # type: ignore[return-value]
    if target == "aten.mul.Tensor" and isinstance(node.args[0], fx.Node) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _centre(graph: fx.Graph, subtraction: fx.Node, source: fx.Node, author: str, report: PassReport) -> None:
    insert, dtype = Inserter(graph, author, subtraction), value(subtraction).dtype
    with graph.inserting_before(subtraction):
        if dtype != value(source).dtype:  # the mean is of a wider type, and the difference is too
            source = insert.call(aten.to.dtype, source, dtype)
        new = project_out_mean(insert, source)
    subtraction.replace_all_uses_with(new)
    report.matched += 1


def project_out_mean(insert: Inserter, source: fx.Node) -> fx.Node:
    """Insert ``source - mean(source)`` over the last axis, in a form that a rotation can pass through."""
    val = value(source)
    size = val.shape[-1]
    direction = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64, device=val.device)
    return insert.call(quarot.project_out.default, source, insert.constant("mean_direction", direction))


def _write_out(graph: fx.Graph, node: fx.Node, author: str, report: PassReport, centred: bool) -> None:
    """Write a fused norm out; half precisions compute in float32, as the fused kernels do."""
    names = ("input", "normalized_shape", "weight", "bias", "eps") if centred else (
        "input", "normalized_shape", "weight", "eps")  # fmt: skip
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    source, shape = arguments["input"], arguments["normalized_shape"]
    if len(shape) != 1 or not isinstance(shape[0], int):
        report.decline(module_path(node), "normalises over several axes")
        return
    gain, bias, eps = arguments.get("weight"), arguments.get("bias"), arguments.get("eps")
    dtype = value(source).dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    if eps is None:
        eps = 1e-5 if centred else torch.finfo(wide).eps
    insert = Inserter(graph, author, node)
    with graph.inserting_before(node):
        x = source if dtype == wide else insert.call(aten.to.dtype, source, wide)
        if centred:
            x = project_out_mean(insert, x)
        length = insert.call(aten.add.Tensor, insert.call(quarot.mean_square.default, x), eps)
        x = insert.call(aten.mul.Tensor, x, insert.call(aten.rsqrt.default, length))
        if gain is not None:
            x = insert.call(aten.mul.Tensor, x, gain)
        if bias is not None:
            x = insert.call(aten.add.Tensor, x, bias)
        if x.meta["val"].dtype != dtype:
            x = insert.call(aten.to.dtype, x, dtype)
    node.replace_all_uses_with(x)
    report.matched += 1
