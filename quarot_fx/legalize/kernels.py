"""Kernels that the dispatcher picked become the operators that they were picked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import FROZEN, Inserter

aten = torch.ops.aten
ATTENTIONS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    aten._scaled_dot_product_flash_attention.default: None,
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
}
NORMS = {
    aten.native_layer_norm.default: aten.layer_norm.default,
    aten._fused_rms_norm.default: aten.rms_norm.default,
}


def name_operators(graph: fx.Graph) -> None:
    """``native_layer_norm(x)[0] -> layer_norm(x)``, and likewise RMSNorm and attention.

    A graph that was traced after dispatch calls kernels, which return what a backward would need besides. Where
    nothing reads that, the operator says the same.
    """
    for node in list(_calls(graph)):
        results = [user for user in node.users if not user.args[1]]
        if FROZEN in node.meta or len(results) != len(node.users):
            continue
        with graph.inserting_before(node):
            insert = Inserter(graph, "legalize", node)
            new = _attention(insert, node) if node.target in ATTENTIONS else _norm(insert, node)
        if new is not None:
            for result in results:
                result.replace_all_uses_with(new)
                graph.erase_node(result)
            graph.erase_node(node)


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.op == "call_function" and node.target in {*ATTENTIONS, *NORMS}:
            yield node


def _norm(insert: Inserter, node: fx.Node) -> fx.Node:
    target: Any = node.target
    return insert.call(NORMS[target], *node.args, **node.kwargs)


def _attention(insert: Inserter, node: fx.Node) -> fx.Node | None:
    if argument(node, "dropout_p"):
        return None
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    mask: str | None = ATTENTIONS[node.target]  # type: ignore[index]
    return insert.call(
        aten.scaled_dot_product_attention.default,
        *(query, key, value),
        argument(node, mask) if mask else None,
        is_causal=argument(node, "is_causal"),
        scale=argument(node, "scale"),
        enable_gqa=query.meta["val"].shape[-3] != key.meta["val"].shape[-3],
    )
