"""What tests of rotation plans ask of a rewritten graph."""

from __future__ import annotations

import re

import torch

from quarot_fx.attention import reads_of_keys_and_values
from quarot_fx.graph import Constants, argument_nodes
from quarot_fx.linear_like import linear_likes


def readers_of_online_transforms(graph):
    """Return for every online transform what reads it: weights by their name in the block, queries, keys, values.

    What the caller gets to see (an output, or a cache that is written) is ``output``.
    """
    weights = {(linear.node, linear.x): linear.parameter.removesuffix(".weight") for linear in linear_likes(graph)}
    reads = list(reads_of_keys_and_values(graph))
    names = {key: re.sub(r".*\.\d+\.", "", name) for key, name in weights.items()}
    names |= {(read.user, argument_nodes(read.user)[0]): "query" for read in reads if read.kind == "key"}
    names |= {(read.user, read.tensor): read.kind for read in reads}

    def readers(node):
        for user in node.users:
            if user.op == "output" or user.target is torch.ops.aten.copy_.default:
                yield "output"
            else:
                yield from [names[user, node]] if (user, node) in names else readers(user)

    constants = Constants(graph)
    transforms = graph.find_nodes(op="call_function", target=torch.ops.quarot.rotate.default)
    return [" ".join(sorted(set(readers(node)))) for node in transforms if node not in constants]
