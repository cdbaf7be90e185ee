"""Equal spellings that a graph needs before passes may change it: nothing here changes what it computes.

``views``       views that depend on strides become ones that do not
``norms``       defaults that depend on the dtype become numbers
``broadcasts``  what is expanded to meet an operand of full size meets it as it is
``einsum``      two-operand sums over indices become matrix products
``examples``    tensors made after the example of another are made by sizes
``indexing``    entries picked by a list in the code are a slice
"""

from __future__ import annotations

from torch import fx

from quarot_fx.legalize.broadcasts import drop_expansions
from quarot_fx.legalize.einsum import write_out_einsum
from quarot_fx.legalize.examples import forget_examples
from quarot_fx.legalize.indexing import take_slices
from quarot_fx.legalize.norms import write_out_default_eps
from quarot_fx.legalize.views import relax_views


def legalize(graph: fx.Graph) -> None:
    """Make a functional graph independent of the strides and dtypes that it was captured with, and of synonyms."""
    take_slices(graph)
    forget_examples(graph)
    relax_views(graph)
    write_out_default_eps(graph)
    drop_expansions(graph)
    write_out_einsum(graph)
