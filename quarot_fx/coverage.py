"""The report of a rewritten program: what became of every linear layer and every cache, read off the graph itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from quarot_fx.attention import before_repetition, reads_of_keys_and_values
from quarot_fx.basis.plan import Site
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.graph import PARAMETER, Constants, argument_nodes, is_float, is_tensor, module_path, stored_tensor
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.quantized import dequantization_of
from quarot_fx.program import Program
from quarot_fx.report import CacheRecord, LinearRecord, OtherWeight, Report
from quarot_fx.roles import Roles


def cover(program: Program) -> Report:
    """Return the report of a program that passes have run on."""
    sites = {(site.kind, site.node): site for site in (program.plan.sites if program.plan else ())}
    declined = {d.where: d.reason for report in program.reports for d in report.declined}
    none = Site("", "", "", "no", "rotations were not placed")
    roles = Roles(program.graph, QuarotConfig())
    layers = list(linear_likes(program.graph))
    linears = []
    for linear in layers:
        site = sites.get(("linear", linear.node.name), none)
        w_bits, a_bits = _weight_bits(linear.weight), _activation_bits(linear.x)
        is_left = w_bits == a_bits == UNQUANTIZED_BITS
        reason = declined.get(linear.parameter, site.why) if is_left else site.why
        role = roles.role(linear)
        linears.append(LinearRecord(linear.parameter, w_bits, a_bits, site.rotated, reason, role))
    caches = []
    for read in reads_of_keys_and_values(program.graph):
        site = sites.get((read.kind, read.user.name), none)
        user, place = before_repetition(read)
        bits = _activation_bits(argument_nodes(user)[place])
        caches.append(CacheRecord(module_path(read.user), read.kind, bits, site.rotated, site.why))
    others = list(_other_weights(program.graph, {linear.node for linear in layers}))
    return Report(list(program.reports), program.plan, linears, caches, others, weight_bytes(program))


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


def _weight_bits(weight: fx.Node) -> int:
    made = dequantization_of(weight)
    return UNQUANTIZED_BITS if made is None else argument_nodes(made)[0].args[1]  # type: ignore[return-value]


def _activation_bits(x: fx.Node) -> int:
    made = dequantization_of(x)
    if made is None:
        return UNQUANTIZED_BITS
    codes = argument_nodes(made)[0]
    return argument_nodes(codes)[0].args[1]  # type: ignore[return-value]
