"""Models that Dynamo cuts into several graphs: what goes from one to the next is in the canonical basis."""

from __future__ import annotations

import pytest
import torch
from graphs import Block, fill
from torch import nn

from quarot_fx.float64 import relative_difference

IDS = torch.arange(10).reshape(2, 5)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Broken(nn.Module):
    """Two blocks between an embedding and a head, with something in their middle that Dynamo cannot trace."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.RMSNorm(16, eps=1e-6)
        self.middle = middle

    def forward(self, ids):
        x = self.blocks[0](self.embedding(ids))
        x = self.middle(x)
        return self.head(self.norm(self.blocks[1](x)))


def breaks(x):
    torch._dynamo.graph_break()
    return x


def branches(x):
    return x * 2 if x.sum() > 0 else -x


def reads_a_number(x):
    return x * float(x.abs().mean().item())


MIDDLES = {"break": breaks, "branch": branches, "item": reads_a_number}


def compiled(model, **options):
    return torch.compile(model, backend="quarot", options={"nested_backend": "eager", **options})


@pytest.mark.parametrize("middle", MIDDLES)
def test_rotation_alone_changes_nothing(middle, graphs):
    model = fill(Broken(MIDDLES[middle])).double()
    result = compiled(model, stop_after="rotate")(IDS)
    assert relative_difference([result], [model(IDS)]) < 1e-9
    assert graphs() > 1


@pytest.mark.parametrize("middle", MIDDLES)
def test_four_bits(middle):
    model = fill(Broken(MIDDLES[middle]))
    result = compiled(model)(IDS)
    assert result.isfinite().all()
    assert relative_difference([result], [model(IDS)]) > 1e-3


def test_the_stream_between_graphs_is_canonical():
    """Somebody who looks at it from outside sees what eager would show."""
    seen = []

    def look(x):
        torch._dynamo.graph_break()
        seen.append(x.clone())
        torch._dynamo.graph_break()
        return x

    model = fill(Broken(look)).double()
    expected = model(IDS)
    result = compiled(model, stop_after="rotate")(IDS)
    assert relative_difference([result, seen[1]], [expected, seen[0]]) < 1e-9


def test_both_branches(graphs):
    model = fill(Broken(branches)).double()
    function = compiled(model, stop_after="rotate")
    signs = set()
    for start in range(12):
        ids = (IDS + start) % 16
        signs.add(bool(model.blocks[0](model.embedding(ids)).sum() > 0))
        assert relative_difference([function(ids)], [model(ids)]) < 1e-9
    assert signs == {True, False}
