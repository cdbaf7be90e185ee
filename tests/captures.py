"""Captures of small programs, and what tests ask of a capture after functionalisation."""

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quarot_fx.aliasing import written_nodes
from quarot_fx.functionalize import functionalize

aten = torch.ops.aten


def trace(function, fakes):
    """Capture as the backend does: pre-dispatch, under the fake mode of the inputs."""
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, torch.Tensor))
    with torch.no_grad(), mode, fx.traceback.preserve_node_meta():
        return make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)


def capture(function, *inputs, dynamic=False):
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=not dynamic, allow_non_fake_inputs=True)
    return trace(function, [mode.from_tensor(tensor, static_shapes=not dynamic) for tensor in inputs])


def body(gm):
    """Return the nodes before the epilogue."""
    written = {id(node) for node in epilogue(gm)}
    return [node for node in gm.graph.nodes if id(node) not in written]


def epilogue(gm):
    nodes = list(gm.graph.nodes)[:-1]
    count = 0
    while count < len(nodes) and nodes[-1 - count].target is aten.copy_.default:
        count += 1
    return nodes[len(nodes) - count :]


def mutations(gm):
    """Return the targets of the operators that still write before the epilogue."""
    return [node.target for node in body(gm) if written_nodes(node) or node.target is aten.detach_.default]


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def shares_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def assert_same(function, gm, *inputs):
    """Run eager and rewritten on copies: equal outputs, equal inputs after, and no new aliases of inputs."""
    theirs, ours = [tensor.clone() for tensor in inputs], [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        expected, actual = function(*theirs), gm(*ours)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for i, (eager, result) in enumerate(zip(expected, actual, strict=True)):
        for before, after in zip(theirs, ours, strict=True):
            assert shares_memory(eager, before) or not shares_memory(result, after), i


def check(function, *inputs, dynamic=False):
    """Functionalise a capture completely, compare it with eager, and return it with its report."""
    gm = capture(function, *inputs, dynamic=dynamic)
    report = functionalize(gm)
    assert not mutations(gm), gm.code
    assert not report.frozen
    assert all(node.args[0].op in ("placeholder", "get_attr") for node in epilogue(gm))
    for node in gm.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta, node
    assert_same(function, gm, *inputs)
    return gm, report


def range_tensor(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape) + 1
