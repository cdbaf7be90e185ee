"""A grammar of small decoder-like programs, from which hypothesis draws.

A *symbol* is a class that says what shapes go in and out (``symbols``); a *production* is a function that computes one,
and its annotated parameters are what is left to choose: other symbols, flags, numbers (``grammar``). So a program is a
tree of productions, and prints as one: ``residual(norm=rms_norm(gain='1 + g'), mixer=mlp(...))``.

``symbols``      the non-terminals
``grammar``      from productions to strategies
``scope``        what productions take their weights and inputs from
``program``      a drawn program, and its capture
``norms`` ``linears`` ``feed_forward`` ``attention`` ``layers``    what decoders are made of
``trap_*``       what no rotation may survive, unless a rule says so
"""

from decoder_grammar import (  # noqa: F401  enters all productions
    attention,
    feed_forward,
    layers,
    linears,
    norms,
    trap_outputs,
    trap_products,
    trap_values,
    trap_views,
    trap_writes,
)
from decoder_grammar.program import Program, programs

__all__ = ["Program", "programs"]
