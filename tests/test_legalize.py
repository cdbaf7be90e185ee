"""Synonyms that a capture brings to one spelling, and what must not change by it."""

import pytest
import torch
from captures import capture, targets
from graphs import tokens

from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.legalize import legalize

aten = torch.ops.aten


def legalized(function, *inputs, dynamic=False):
    """Capture and legalize a function; the outputs stay what eager gives."""
    gm = capture(function, *inputs, dynamic=dynamic)
    legalize(gm.graph)
    gm.graph.lint()
    gm.recompile()
    expected = function(*(tensor.double() for tensor in inputs))
    (result,) = run_in_float64(gm, *inputs)
    assert result.shape == expected.shape
    assert relative_difference([result], [expected]) < 1e-14
    return gm


EINSUMS = {
    "bhid,bhjd->bhij": ((2, 3, 5, 4), (2, 3, 7, 4)),  # scores
    "bhij,bhjd->bhid": ((2, 3, 5, 7), (2, 3, 7, 4)),  # mix
    "bihd,bjhd->bhij": ((2, 5, 3, 4), (2, 7, 3, 4)),  # heads after tokens
    "bghid,bhjd->bghij": ((2, 6, 3, 5, 4), (2, 3, 7, 4)),  # grouped heads
    "bhid,bjd->bhij": ((2, 3, 5, 4), (2, 7, 4)),  # one head of keys
    "...d,df->...f": ((2, 5, 4), (4, 6)),  # a linear layer
    "...ij,...jk": ((2, 5, 4), (2, 4, 6)),
    "btd,dhe->bthe": ((2, 5, 4), (4, 3, 6)),  # with a weight of heads
    "bthe,hed->btd": ((2, 5, 3, 6), (3, 6, 4)),
    "oi,bi->bo": ((6, 4), (2, 4)),  # the weight first
    "i,j->ij": ((5,), (4,)),  # angles of RoPE
    "i,i->": ((5,), (5,)),
    "bi,bi->b": ((2, 5), (2, 5)),
    "b i d , b j d -> b i j": ((2, 5, 4), (2, 7, 4)),
}


@pytest.mark.parametrize("equation", EINSUMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_einsum_is_a_matrix_product(equation, dynamic):
    inputs = [tokens(*shape) for shape in EINSUMS[equation]]
    gm = legalized(lambda x, y: torch.einsum(equation, x, y), *inputs, dynamic=dynamic)
    assert aten.matmul.default in targets(gm)
    assert aten.einsum.default not in targets(gm)


@pytest.mark.parametrize("equation", ["bii,bij->bj", "bij,bkj->bk"], ids=["diagonal", "summed_alone"])
def test_einsum_that_is_none_stays(equation):
    gm = legalized(lambda x, y: torch.einsum(equation, x, y), tokens(2, 4, 4), tokens(2, 4, 4))
    assert aten.einsum.default in targets(gm)


def test_linear_einsum_keeps_the_axes_of_its_input():
    gm = legalized(lambda x, w: torch.einsum("btd,df->btf", x, w), tokens(2, 5, 4), tokens(4, 6))
    assert targets(gm) == [aten.matmul.default]


@pytest.mark.parametrize("dynamic", [False, True])
def test_expansion_to_the_other_operand_is_dropped(dynamic):
    gm = legalized(lambda x: torch.nn.functional.normalize(x, dim=-1), tokens(2, 5, 4), dynamic=dynamic)
    assert targets(gm) == [aten.linalg_vector_norm.default, aten.clamp_min.default, aten.div.Tensor]


def test_expansion_that_gives_the_result_its_shape_stays():
    gm = legalized(lambda x: x.expand(3, 4) * x.expand(3, 4), tokens(4))
    assert aten.expand.default in targets(gm)


def test_scalar_keeps_its_say_in_the_dtype():
    gm = capture(lambda x, s: x * s.expand(4), tokens(4), torch.tensor(2.0, dtype=torch.float64))
    legalize(gm.graph)
    assert aten.expand.default in targets(gm)
