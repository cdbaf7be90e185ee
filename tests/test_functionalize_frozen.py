"""In-place operators without a functional form stay as they are, with everything that shares their memory."""

import torch
from captures import assert_same, capture, check, mutations, range_tensor, targets, trace
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quarot_fx.functionalize import functionalize
from quarot_fx.graph import FROZEN

aten = torch.ops.aten

LIBRARY = torch.library.Library("functionalize_test", "DEF")
LIBRARY.define("bump_(Tensor(a!) x) -> ()")
LIBRARY.impl("bump_", lambda x: [x.add_(100)].clear(), "CompositeExplicitAutograd")
torch.library.register_fake("functionalize_test::bump_", lambda x: None, lib=LIBRARY)
bump_ = torch.ops.functionalize_test.bump_


def check_frozen(function, *inputs):
    gm = capture(function, *inputs)
    report = functionalize(gm)
    assert report.frozen
    marked = {node.name: node.meta[FROZEN] for node in gm.graph.nodes if FROZEN in node.meta}
    assert report.frozen == marked
    assert_same(function, gm, *inputs)
    return gm, report


def test_custom_operator_without_counterpart_freezes_its_storage():
    def program(x, y):
        z = x * 2
        z[0].add_(1)  # frozen too: it writes what bump_ writes
        held = torch.empty_like(x)
        held.copy_(z)
        before = z.sum()
        bump_(z[1:])
        other = x + 1
        other[0].mul_(2)  # not frozen
        y.add_(z[0])
        return held, before, z, z.sum(), other

    gm, report = check_frozen(program, range_tensor(4, 3), range_tensor(3))
    assert mutations(gm) == [aten.add_.Tensor, bump_.default]
    assert report.rewritten == ("copy_", "mul_", "add__1")
    assert len(report.mutated_inputs) == 1
    names = {node.name: node.target for node in gm.graph.nodes}
    frozen = [names[name] for name in report.frozen]
    assert frozen == [
        aten.clone.default,  # of the product, which is not frozen
        aten.select.int,
        aten.add_.Tensor,
        aten.slice.Tensor,
        bump_.default,
        aten.select.int,
    ]
    assert all("no functional counterpart" in reason for reason in report.frozen.values())


def test_custom_operator_on_an_input():
    def program(x):
        before = x + 0
        x.mul_(2)
        bump_(x)
        x.add_(1)
        return before, x * 1

    gm, report = check_frozen(program, range_tensor(3))
    assert mutations(gm) == [aten.mul_.Tensor, bump_.default, aten.add_.Tensor]
    assert not report.mutated_inputs


def test_what_is_frozen_is_read_in_copies():
    def program(x):
        z = x * 2
        before = z * 3
        bump_(z)
        return before, z * 5, z

    gm, report = check_frozen(program, range_tensor(3))
    for node in gm.graph.nodes:
        if node.target is aten.mul.Tensor:
            assert node.name not in report.frozen
            assert not any(FROZEN in source.meta for source in node.all_input_nodes)


def test_metadata_mutation_freezes():
    def program(x):
        z = x * 2
        z.t_()
        z.add_(1)
        return (z * 1,)

    _, report = check_frozen(program, range_tensor(2, 3))
    assert all("changes the shape or storage" in reason for reason in report.frozen.values())


def test_view_without_inverse_freezes():
    def program(x):
        z = x * 2
        z.unfold(0, 2, 2).mul_(2)
        return (z,)

    _, report = check_frozen(program, range_tensor(4))
    assert all("no inverse" in reason for reason in report.frozen.values())


def test_alias_by_strides_freezes_only_if_written():
    def program(x):
        z = x * 2
        strided = z.as_strided((2, 2), (1, 1))
        z.add_(1)
        return strided + 0, x.as_strided((2,), (2,)) + 0

    _, report = check_frozen(program, range_tensor(4))
    assert all("as_strided" in reason for reason in report.frozen.values())
    gm = capture(lambda x: (x.as_strided((2, 2), (1, 1)) + 0,), range_tensor(4))
    assert not functionalize(gm).frozen


def test_inputs_that_share_storage_freeze():
    def program(x, y):
        x.add_(1)
        return (y * 1,)

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with mode:
        base = torch.empty(4)
        views = [base[:3], base[1:]]
    gm = trace(program, views)
    report = functionalize(gm)
    assert all("no known view" in reason for reason in report.frozen.values())
    memory, expected = range_tensor(4), range_tensor(4)
    torch.testing.assert_close(gm(memory[:3], memory[1:]), program(expected[:3], expected[1:]))
    torch.testing.assert_close(memory, expected)


def test_memory_out_of_reach_freezes():
    def program(x):
        z = x.to_sparse()
        z.mul_(2)
        return (z.to_dense(),)

    _, report = check_frozen(program, range_tensor(3))
    assert all("no storage" in reason for reason in report.frozen.values())


def branch(x):
    z = x * 2
    z.add_(1)
    return (torch.cond(z.sum() > 0, lambda v: v + 1, lambda v: v - 1, (z,)),)


def test_higher_order_operator_that_reads():
    gm, _ = check(branch, range_tensor(3))
    assert torch.ops.higher_order.cond in targets(gm)


def test_higher_order_operator_that_writes_freezes():
    gm = capture(branch, range_tensor(3))
    (inner,) = (node for node in gm.true_graph_0.graph.nodes if node.op == "call_function")
    inner.target = aten.add_.Tensor
    report = functionalize(gm)
    assert not report.rewritten
    targets_by_name = {node.name: node.target for node in gm.graph.nodes}
    assert {aten.clone.default, aten.add_.Tensor} < {targets_by_name[name] for name in report.frozen}
    assert all("mutates its operands" in reason for reason in report.frozen.values())
