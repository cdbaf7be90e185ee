import pytest
import torch
from graphs import WIDTH, Lambda, apply, captured, linear, rewritten, targets, tokens

from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.recognize_experts import RecognizeExperts
from quarot_fx.passes.rotate import Rotate

WEIGHTS = {"stack": (4, 6, WIDTH), "turned": (4, WIDTH, 6), "router": linear(4)}


def chosen(m, x):
    """Rows of a batch and the expert of each."""
    x = x.flatten(0, 1)
    return x, m.router(x).argmax(-1)


def weight_first(m, x):
    rows, experts = chosen(m, x)
    return torch.bmm(m.stack[experts], rows.unsqueeze(-1)).squeeze(-1)


def weight_last(m, x):
    rows, experts = chosen(m, x)
    return torch.bmm(rows.unsqueeze(1), m.turned[experts]).squeeze(1)


def with_axes_kept(m, x):
    rows, experts = chosen(m, x)
    return m.stack[experts] @ rows.view(-1, WIDTH, 1)


@pytest.mark.parametrize("forward", [weight_first, weight_last, with_axes_kept])
def test_picked_weights(forward):
    program = captured(Lambda(forward, **WEIGHTS), tokens())
    result, report = apply(RecognizeExperts(), program, tokens())
    assert (report.matched, report.declined) == (1, [])
    assert "index" not in targets(result)
    assert targets(result).count("expert_linear") == 1
    assert len(list(linear_likes(result.graph))) == 2  # the router too
    rotated = rewritten(result, PlaceRotations(), Rotate())
    assert [site.rotated for site in rotated.plan.sites] == ["no", "online"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.bmm(m.stack[m.router(x[0]).argmax(-1)], x[0].unsqueeze(-1).expand(-1, -1, 2)),  # matrices
        lambda m, x: m.router(x) @ m.stack[:, 0] @ m.turned[0],  # not picked by row
        lambda m, x: torch.bmm(m.stack[torch.tensor([0, 2])], x.mT)[..., :1] * m.router(x).sum(),  # picked once for all
    ],
)
def test_other_products_stay(forward):
    program = captured(Lambda(forward, **WEIGHTS), tokens())
    result, report = apply(RecognizeExperts(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)
