"""Factors against a model that can be read at a glance: axes as lists of primes with colours."""

import math
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarot_fx.basis.factors import Factors


def sizes(factors, axis):
    return [factors.size(leaf) for leaf in factors.leaves(axis)]


def test_equal_sizes_become_one_factor():
    factors = Factors()
    a, b = factors.new(8), factors.new(8)
    assert factors.leaves([a]) != factors.leaves([b])
    assert factors.unify([a], [b])
    assert factors.leaves([a]) == factors.leaves([b])


def test_a_view_splits_a_factor_everywhere():
    factors = Factors()
    hidden, other, heads, size = factors.new(64), factors.new(64), factors.new(4), factors.new(16)
    assert factors.unify([hidden], [other])
    assert factors.unify([hidden], [heads, size])
    assert factors.leaves([other]) == factors.leaves([hidden]) == factors.leaves([heads, size])
    assert sizes(factors, [other]) == [4, 16]


def test_splits_meet_in_the_middle():
    factors = Factors()
    left, right = [factors.new(4), factors.new(6)], [factors.new(12), factors.new(2)]
    assert factors.unify(left, right)
    assert sizes(factors, left) == sizes(factors, right) == [4, 3, 2]


@pytest.mark.parametrize(("left", "right"), [([2, 3], [3, 2]), ([6], [4]), ([4, 6], [6, 4]), ([6], []), ([2], [2, 2])])
def test_what_does_not_nest_is_refused_and_nothing_changes(left, right):
    factors = Factors()
    a, b = [factors.new(size) for size in left], [factors.new(size) for size in right]
    assert not factors.unify(a, b)
    assert (factors.leaves(a), factors.leaves(b)) == (a, b)


def test_a_factor_that_occurs_twice_is_refused_or_split_alike():
    factors = Factors()
    a = factors.new(6)
    outcome = factors.unify([a, a], [factors.new(size) for size in (2, 3, 3, 2)])
    assert not outcome
    assert math.prod(sizes(factors, [a])) == 6, "split perhaps, but never wrongly"


def test_a_factor_is_unified_with_itself():
    factors = Factors()
    a, b = factors.new(6), factors.new(6)
    assert factors.unify([a], [a])
    assert factors.unify([a, b], [b, a])
    assert factors.leaves([a]) == factors.leaves([b])


# -- against brute force ---------------------------------------------------------------------------


@st.composite
def programs(draw):
    """Axes, each of a size of its own, and unifications of single axes with products of them."""
    count = draw(st.integers(2, 6))
    axes = [draw(st.lists(st.sampled_from([2, 3, 4, 6, 12]), min_size=1, max_size=3)) for _ in range(count)]
    pairs = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), min_size=1, max_size=6))
    return axes, pairs


class Brute:
    """Every axis as the set of its boundaries (partial products from the outside), closed by repetition.

    Two axes that were unified have the same boundaries, which are those of either of them. Factors are the gaps, known
    by size only: where factors end up shared is checked by the laws below, not here.
    """

    def __init__(self, axes):
        self.bounds = [{prod(axis[:place]) for place in range(len(axis) + 1)} for axis in axes]
        self.group = list(range(len(axes)))

    def unify(self, i, j):
        union = sorted(self.bounds[i] | self.bounds[j])
        if max(self.bounds[i]) != max(self.bounds[j]) or any(y % x for x, y in pairwise(union)):
            return False
        old, new = self.group[j], self.group[i]
        self.group = [new if group == old else group for group in self.group]
        for axis, group in enumerate(self.group):
            if group == new:
                self.bounds[axis] = set(union)
        return True

    def sizes(self, axis):
        union = sorted(self.bounds[axis])
        return [y // x for x, y in pairwise(union)]


@given(programs())
def test_boundaries_are_those_of_the_brute_force_model(program):
    """Each factor occurs in one axis only here, so that boundaries are all there is."""
    shapes, pairs = program
    factors, brute = Factors(), Brute(shapes)
    axes = [[factors.new(size) for size in shape] for shape in shapes]
    for i, j in pairs:
        assert factors.unify(axes[i], axes[j]) == brute.unify(i, j)
        for axis, given_factors in enumerate(axes):
            assert sizes(factors, given_factors) == brute.sizes(axis)
    for i in range(len(axes)):
        for j in range(len(axes)):
            assert (factors.leaves(axes[i]) == factors.leaves(axes[j])) == (brute.group[i] == brute.group[j])


@given(programs(), st.data())
def test_laws(program, data):
    shapes, pairs = program
    factors = Factors()
    axes = [[factors.new(size) for size in shape] for shape in shapes]
    for i, j in pairs:
        before = [factors.leaves(axis) for axis in axes]
        unified = factors.unify(axes[i], axes[j])
        after = [factors.leaves(axis) for axis in axes]
        assert unified == (after[i] == after[j])
        assert factors.unify(axes[j], axes[i]) == unified, "it is symmetric"
        assert [factors.leaves(axis) for axis in axes] == after, "and idempotent"
        if not unified:
            assert after == before
        for axis, shape in zip(axes, shapes, strict=True):
            assert prod(sizes(factors, axis)) == prod(shape), "sizes are kept"
            assert factors.leaves(factors.leaves(axis)) == factors.leaves(axis), "leaves are leaves"
            whole = [leaf for factor in axis for leaf in factors.leaves([factor])]
            assert whole == factors.leaves(axis), "an axis is the product of its factors"
