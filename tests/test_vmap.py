"""What ``torch.vmap`` vectorises inside of a model is captured as plain operators, weights and all."""

import pytest
import torch
from graphs import WIDTH, Lambda, linear, tokens
from torch._higher_order_ops.associative_scan import associative_scan

from quarot_fx.float64 import relative_difference

pytestmark = pytest.mark.usefixtures("graphs")


def scan(m, x):
    """The state of a selective scan after every token."""

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return m.a(associative_scan(combine, (m.decay(x).sigmoid(), x), dim=1, combine_mode="generic")[1])


FUNCTIONS = {
    "one region": lambda m, x: m.a(torch.vmap(lambda row: row * row.sum())(x)),
    "a matrix product in it": lambda m, x: m.a(torch.vmap(lambda row: row @ row.T @ row)(x)),
    "a weight in it": lambda m, x: torch.vmap(lambda row: m.a(row))(x),
    "one in another": lambda m, x: m.a(torch.vmap(torch.vmap(lambda row: row * row.sum()))(x)),
    "another axis": lambda m, x: m.a(torch.vmap(lambda row: row.cumsum(0), in_dims=1, out_dims=1)(x)),
    "a constant in it": lambda m, x: m.a(torch.vmap(lambda row: row * torch.arange(WIDTH))(x)),
    "associative scan": scan,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_vectorised_regions(name, dynamic):
    model = Lambda(FUNCTIONS[name], a=linear(6), decay=linear(WIDTH)).eval()
    options = {"nested_backend": "eager", "stop_after": "rotate"}
    compiled = torch.compile(model, backend="quarot", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        assert relative_difference([compiled(tokens())], [model(tokens())]) < 1e-5
