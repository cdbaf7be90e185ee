import operator
import weakref

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from quarot_fx.compile_time import LARGEST, CompileTimeValues
from quarot_fx.graph import FROZEN, PARAMETER, fake_result

aten = torch.ops.aten


@pytest.fixture
def build():
    """Build a graph call by call: ``build(aten.ones.default, [3])``."""
    return Builder()


class Builder:
    def __init__(self):
        self.graph, self.mode = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)
        self.root = torch.nn.Module()

    def __call__(self, target, *args, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_result(node, self.mode)
        return node

    def stored(self, name, tensor, **meta):
        self.root.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        node.meta.update(meta, val=self.mode.from_tensor(tensor))
        return node

    def given(self, name, val):
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(val) if isinstance(val, torch.Tensor) else val
        return node

    def values(self):
        self.graph.output(None)
        return CompileTimeValues(fx.GraphModule(self.root, self.graph).graph)


def reason(build, node):
    """Return why a node's value is not known."""
    values = build.values()
    return values.reason_against(next(n for n in values._graph.nodes if n.name == node.name))


def test_factories_and_literals_are_known(build):
    literal = build.stored("literal", torch.tensor([1.0, 2.0]))
    first = build(operator.getitem, build(aten.split.Tensor, build(aten.arange.default, 4), 2), 0)
    assert reason(build, build(aten.add.Tensor, first, literal)) is None


def test_what_the_caller_gives_is_not_known(build):
    x, weight = build.given("x", torch.ones(2)), build.stored("weight", torch.ones(2), **{PARAMETER: "weight"})
    assert reason(build, build(aten.mul.Tensor, weight, x)) == "depends on the input 'x'"


def test_a_number_that_the_caller_gives_is_not_known(build):
    assert reason(build, build.given("size", 3)) == "depends on the input 'size'"


def test_parameters_and_caches_are_not_known(build):
    weight = build.stored("weight", torch.ones(2), **{PARAMETER: "layer.weight"})
    assert reason(build, build(aten.neg.default, weight)) == "depends on the stored tensor 'layer.weight'"


def test_what_the_graph_writes_is_not_known(build):
    state = build.stored("state", torch.ones(2))
    build(aten.copy_.default, state, build(aten.zeros.default, [2]))
    assert reason(build, build(aten.neg.default, state)) == "depends on the stored tensor 'state'"


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (aten.rand.default, [[2]], {}, "depends on aten.rand.default, whose result differs from call to call"),
        (aten.empty.memory_format, [[2]], {}, "depends on uninitialised memory"),
        (aten.ones.default, [[2]], {"device": "meta"}, "has no data, only sizes"),
        (aten.ones.default, [[LARGEST // 4 + 1]], {}, "takes more than 1 GiB, which is not computed at compile time"),
        (torch.ones, [2], {}, "which is no ATen operator"),
    ],
)
def test_what_is_not_computed(target, args, kwargs, expected, build):
    source = build(target, *args, **kwargs)
    assert expected in reason(build, build(aten.abs.default, source))


def test_views_of_one_number_are_as_small_as_it(build):
    row = build(aten.ones.default, [1, 1])
    assert reason(build, build(aten.expand.default, row, [LARGEST, 2])) is None


def test_what_is_changed_in_place_is_not_known(build):
    node = build(aten.ones.default, [2])
    node.meta[FROZEN] = "somebody writes it"
    assert reason(build, build(aten.neg.default, node)) == "is changed in place: somebody writes it"


def test_values_are_computed_once_and_let_go(build):
    shared = build(aten.arange.default, 3)
    build(aten.add.Tensor, shared, 1)
    build(aten.neg.default, shared)
    values = build.values()
    nodes = list(values._graph.nodes)[:3]
    seen = []

    def verdict(value):
        assert not any(earlier() is not None for earlier in seen[1:])  # but for the shared one
        seen.append(weakref.ref(value))
        return value.tolist()

    assert values.judge(nodes, verdict) == dict(zip(nodes, ([0, 1, 2], [1, 2, 3], [0, -1, -2]), strict=True))
    assert values.judge([], verdict) == {}
