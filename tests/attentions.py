"""Attention as the tests of simplify-attention ask about it: its arguments, and what remains in a graph around it."""

from graphs import WIDTH, apply, captured, node_named, targets, tokens

from quarot_fx.aliasing import argument
from quarot_fx.passes.simplify_attention import SimplifyAttention

ATTENTION = "aten.scaled_dot_product_attention.default"
LENGTH = 5


def heads():
    """Tokens of two sequences, in two heads."""
    return tokens(2, 2, LENGTH, WIDTH)


def simplified(module, *inputs):
    """Return the attention node, what remains in the graph, and the report."""
    result, report = apply(SimplifyAttention(), captured(module, *inputs), *inputs)
    return node_named(result, ATTENTION), targets(result), report


def options(attention):
    """Return the arguments of an attention, but for its three tensors, that are not the default."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return {name: given for name in names if (given := argument(attention, name)) not in (None, False, 0.0)}
