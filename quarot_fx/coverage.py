"""The report of a rewritten program: what became of every linear layer and every cache, read off the graph itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.attention import Read, before_repetition, reads_codes, reads_of_keys_and_values
from quarot_fx.basis.plan import Site
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.graph import PARAMETER, Constants, argument_nodes, is_float, is_tensor, module_path, stored_tensor
from quarot_fx.linear_like import LAYERS, Layer, linear_likes
from quarot_fx.ops import append_dequantize
from quarot_fx.ops.declaration import reference_of
from quarot_fx.passes.quantized import quantized_activation, quantized_weight
from quarot_fx.program import Program
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
        linears.append(LinearRecord(layer.parameter, layer.w_bits, layer.a_bits, site.rotated, reason, layer.role))
    caches = []
    for read in reads_of_keys_and_values(program.graph):
        site = sites.get((read.kind, read.name), none)
        caches.append(CacheRecord(module_path(read.user), read.kind, _cache_bits(read), site.rotated, site.why))
    others = list(_other_weights(program.graph, set(layers)))
    return Report(list(program.reports), program.plan, linears, caches, others, weight_bytes(program))


def _layers(graph: fx.Graph) -> Iterator[tuple[fx.Node, Sequence[Layer]]]:
    """Yield every product that is a linear layer, or several, in order."""
    roles = Roles(graph, QuarotConfig())
    linears = {linear.node: linear for linear in linear_likes(graph)}
    for node in graph.nodes:
        if LAYERS in node.meta:
            yield node, node.meta[LAYERS]
        elif node in linears:
            linear, weight = linears[node], quantized_weight(linears[node].weight)
            w_bits = weight.bits if weight else UNQUANTIZED_BITS
            yield node, [Layer(node.name, linear.parameter, w_bits, _activation_bits(linear.x), roles.role(linear))]


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


def _cache_bits(read: Read) -> int:
    """Return the bits of the keys or values that are read: as an op takes them, or as they were made."""
    if reads_codes(read.user):
        return int(argument(read.user, f"{read.kind[0]}_bits"))
    user, place = before_repetition(read)
    x = argument_nodes(user)[place]
    is_appended = reference_of(x.target) is append_dequantize
    return int(argument(x, "bits")) if is_appended else _activation_bits(x)


def _activation_bits(x: fx.Node) -> int:
    quantized = quantized_activation(x)
    return quantized.scheme.bits if quantized else UNQUANTIZED_BITS
