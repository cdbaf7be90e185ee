"""The report of a rewritten program: what became of every linear layer and every cache, read off the graph itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from quarot_fx.attention import Quantized, Read, reads_of_keys_and_values
from quarot_fx.basis.plan import Site
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.graph import PARAMETER, Constants, is_float, is_tensor, module_path, stored_tensor
from quarot_fx.linear_like import LAYERS, Layer, linear_likes
from quarot_fx.passes.quantized import quantized_activation, quantized_weight
from quarot_fx.program import Program
from quarot_fx.quantized_reads import codes_of_cache
from quarot_fx.report import CacheRecord, LinearRecord, OtherWeight, Report
from quarot_fx.roles import Roles


def cover(program: Program) -> Report:
    """Return the report of a program that passes have run on."""
    sites = {(site.kind, site.node): site for site in (program.plan.sites if program.plan else ())}
    declined = {d.where: d.reason for report in program.reports for d in report.declined}
    none = Site("", "", "", "no", "rotations were not placed")
    linears = []
    layers = dict(_layers(program.graph))
    for layer in (layer for found in layers.values() for layer in found):
        site = sites.get(("linear", layer.node), none)
        is_left = layer.w_bits == layer.a_bits == UNQUANTIZED_BITS
        reason = declined.get(layer.parameter, site.why) if is_left else site.why
        linears.append(
            LinearRecord(
                layer.parameter,
                layer.w_bits,
                layer.a_bits,
                site.rotated,
                reason,
                layer.role,
                layer.rounding,
                layer.a_clip,
            )
        )
    caches = []
    for read in reads_of_keys_and_values(program.graph):
        site = sites.get((read.kind, read.name), none)
        quantized = _quantized(read)
        record = CacheRecord(module_path(read.user), read.kind, quantized.bits, site.rotated, site.why, quantized.by)
        caches.append(record)
    others = list(_other_weights(program.graph, set(layers)))
    return Report(list(program.reports), program.plan, linears, caches, others, weight_bytes(program))


def _quantized(read: Read) -> Quantized:
    """Return how keys or values were quantised, also where the pass that notes it has not run."""
    codes = codes_of_cache(read) if read.quantized is None else None
    return read.quantized or (Quantized(codes.bits, "cache") if codes else Quantized(UNQUANTIZED_BITS, ""))


def _layers(graph: fx.Graph) -> Iterator[tuple[fx.Node, Sequence[Layer]]]:
    """Yield every product that is a linear layer, or several, in order."""
    roles = Roles(graph, QuarotConfig())
    linears = {linear.node: linear for linear in linear_likes(graph)}
    for node in graph.nodes:
        if LAYERS in node.meta:
            yield node, node.meta[LAYERS]
        elif node in linears:
            linear, weight = linears[node], quantized_weight(linears[node].weight)
            w_bits, rounding = (weight.bits, weight.rounding) if weight else (UNQUANTIZED_BITS, "")
            x = quantized_activation(linear.x)
            a_bits, a_clip = (x.scheme.bits, x.scheme.clip) if x else (UNQUANTIZED_BITS, None)
            role = roles.role(linear)
            yield node, [Layer(node.name, linear.parameter, w_bits, a_bits, role, rounding, a_clip)]


def _other_weights(graph: fx.Graph, layers: set[fx.Node]) -> Iterator[OtherWeight]:
    """Yield the matrices that anything but a linear layer or an embedding reads, themselves or what is made of them."""
    constants = Constants(graph)
    expected = layers.union(graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default))
    for node in graph.find_nodes(op="get_attr"):
        if PARAMETER not in node.meta or not is_float(node) or node.meta["val"].ndim < 2:
            continue
        pending, readers = [node], dict[fx.Node, None]()
        while pending:
            users = pending.pop().users
            pending += [user for user in users if user in constants]
            readers.update((user, None) for user in users if user not in constants and user not in expected)
        if readers:
            reader = next(iter(readers))
            yield OtherWeight(node.meta[PARAMETER], "the output" if reader.op == "output" else str(reader.target))


def weight_bytes(program: Program) -> tuple[int, int]:
    """Return the bytes of the parameters that the captured graph reads, and of what the graph holds now."""
    now = {id(tensor): tensor for tensor in _stored(program.graph)}
    return program.original_bytes, sum(tensor.nbytes for tensor in now.values())


def _stored(graph: fx.Graph) -> Iterator[torch.Tensor]:
    for node in graph.find_nodes(op="get_attr"):
        if is_tensor(node) and PARAMETER in node.meta:
            yield stored_tensor(node)
