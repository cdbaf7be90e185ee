"""Synonyms that a capture brings to one spelling, and what must not change by it."""

import pytest
import torch
from captures import capture, targets
from graphs import tokens

from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.functionalize import functionalize
from quarot_fx.legalize import legalize

aten = torch.ops.aten


def legalized(function, *inputs, dynamic=False):
    """Capture and legalize a function; the outputs stay what eager gives."""
    gm = capture(function, *inputs, dynamic=dynamic)
    functionalize(gm)  # as in a capture; it takes away copies of what the code spells out
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


EXAMPLES = {
    "new_zeros": (lambda x: x.new_zeros(3, 5) + x.sum(), aten.zeros.default),
    "new_full": (lambda x: x.new_full((3, 5), 1.5) + x.sum(), aten.full.default),
    "zeros_like": (lambda x: torch.zeros_like(x) + x, aten.zeros.default),
    "ones_like": (lambda x: torch.ones_like(x) + x, aten.ones.default),
    "full_like": (lambda x: torch.full_like(x, 1.5) + x, aten.full.default),
    "expand_as": (lambda x: x[:1].expand_as(x).contiguous(), aten.expand.default),
    "type_as": (lambda x: x.half().type_as(x), aten.to.device),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_tensors_made_after_an_example_are_made_by_size(name):
    function, factory = EXAMPLES[name]
    gm = capture(function, tokens(2, 5, 4))
    legalize(gm.graph)
    gm.recompile()
    assert factory in targets(gm)
    assert not {f"aten.{name}.default"} & set(map(str, targets(gm)))
    torch.testing.assert_close(gm(tokens(2, 5, 4)), function(tokens(2, 5, 4)))


def test_an_example_of_unknown_size_stays():
    gm = legalized(lambda x: torch.zeros_like(x) + x, tokens(2, 5, 4), dynamic=True)
    assert aten.zeros_like.default in targets(gm)


@pytest.mark.parametrize(
    ("function", "slices"),
    [
        (lambda x: x[:, [1, 2]], 1),
        (lambda x: x[:, :, [-1]], 1),
        (lambda x: x[:, [2, 1]], 0),  # another order
        (lambda x: x[:, [0, 2]], 0),  # apart
        (lambda x: x[[0, 1], [1, 2]], 0),  # element by element
    ],
)
def test_positions_side_by_side_are_a_slice(function, slices):
    gm = legalized(function, tokens(2, 5, 4))
    assert targets(gm).count(aten.slice.Tensor) == slices
    assert targets(gm).count(aten.index.Tensor) == 1 - slices


def test_pairs_may_have_any_strides_when_they_become_complex():
    def rope(x):
        pairs = x.transpose(1, 2).float().reshape(2, 4, -1, 1).expand(2, 4, 5, 2)
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * 1j).flatten(2)

    legalized(rope, tokens(2, 5, 4))
