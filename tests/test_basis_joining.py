"""Adjacent factors that are always rotated together get one rotation; factors that part somewhere do not."""

import torch
from graphs import Lambda, captured, difference, linear, rewritten, tokens

from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.rotate import Rotate

WIDTH = 16


def planned(function, *parts, **named):
    """The online transforms of a module whose linear layers are rotated, after a check that nothing changed."""
    program = captured(Lambda(function, **named), *parts)
    rotated = rewritten(program, PlaceRotations(), Rotate())
    assert difference(rotated, program, *parts) < 1e-9
    return rotated.plan.online


def turned_pairs(x):
    """What RoPE does to pairs of channels."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even - odd, even + odd), -1).flatten(-2)


def test_pairs_of_rope_and_their_number_are_rotated_at_once():
    (transform,) = planned(lambda m, x: m.a(turned_pairs(x)), tokens(), a=linear(6))
    assert transform.rotation == f"hadamard-{WIDTH}"
    assert transform.inner == 1


def test_three_factors():
    def function(m, x):
        return m.a(x.reshape(2, 3, 4, 2, 2).sin().flatten(2))

    (transform,) = planned(function, tokens(), a=linear(6))
    assert transform.rotation == f"hadamard-{WIDTH}"


def test_factors_that_are_rotated_in_different_places_stay_apart():
    """The second factor is summed over by itself elsewhere, and so is canonical where the first is not."""

    def function(m, x):
        split = torch.sin(x).reshape(2, 3, 8, 2)
        return m.a(split.flatten(2)) + m.b(split.sum(-1))

    rotations = {t.rotation for t in planned(function, tokens(), a=linear(6), b=linear(6, width=8))}
    assert rotations == {"hadamard-8", "hadamard-2"}


def test_factors_in_another_order_stay_apart():
    def function(m, x):
        y = torch.sin(x).reshape(2, 3, 4, 4)
        return m.a(y.flatten(2)) + m.b(y.transpose(2, 3).flatten(2))

    planned(function, tokens(), a=linear(6), b=linear(6))
