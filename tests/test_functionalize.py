"""A functionalised graph does what the captured program did, to its outputs and to its inputs."""

import pytest
import torch
from captures import assert_same, capture, check, epilogue, mutations, range_tensor, targets

from quarot_fx.aliasing import functional_overload
from quarot_fx.functionalize import functionalize

aten = torch.ops.aten


# -- what is written -------------------------------------------------------------------------------


def write_fresh(x, y):
    z = x * 2
    z.add_(y).mul_(3)
    return (z,)


def write_slice(x, y):
    z = x * 2
    z[:, 1:] += 1
    return (z,)


def write_row(x, y):
    z = x * 2
    z[0].copy_(y)
    return (z,)


def write_chain(x, y):
    z = x * 2
    z.unsqueeze(0).transpose(1, 2)[:, 1:, 0].squeeze(0).mul_(-1)
    return (z,)


def write_transposed(x, y):
    z = x * 2
    z.t()[1].copy_(torch.full((4,), 7.0))
    z.permute(1, 0).add_(1)
    z.movedim(0, 1).swapaxes(0, 1).sub_(2)
    return (z,)


def write_reshaped(x, y):
    z = x * 2
    z.view(-1)[2:5] = 0
    z.flatten().unflatten(0, (2, -1))[1].neg_()
    return (z,)


def write_parts(x, y):
    z = x * 2
    first, second = z.chunk(2, dim=0)
    first.add_(second)
    z.split([1, 2], dim=-1)[1].mul_(2)
    z.unbind(1)[-1].zero_()
    z.tensor_split(2)[0].exp_()
    return z, first, second


def write_diagonal_and_narrow(x, y):
    z = x * 2
    z.diagonal(1).fill_(5)
    z.narrow(0, 1, 2).add_(1)
    z.narrow(0, -2, 2).mul_(2)
    return (z,)


def read_before_and_after(x, y):
    z = x * 2
    alias = z[1:]
    before = alias.sum(0)
    z.mul_(10)
    after = alias.sum(0)
    alias.sub_(y)
    return before, after, z.sum(0), alias.clone()


def two_aliases(x, y):
    z = x * 2
    rows, columns = z[:2], z[:, :2]
    rows.add_(1)
    columns.mul_(2)
    rows.copy_(columns.t()[:, :3] + 0)
    return rows, columns, z


def write_through_full_slice(x, y):
    z = torch.zeros_like(x)
    z[:] = x
    w = z.detach()
    w.add_(1)
    return z, w


def write_everything(x, y):
    z = x * 2
    z.masked_fill_(z > 8, 0.5)
    z.index_put_((torch.tensor([0, 2]),), y, accumulate=True)
    z.scatter_(1, torch.zeros(4, 1, dtype=torch.long), 9.0)
    z.index_copy_(0, torch.tensor([1]), y[None])
    z.clamp_(max=20.0).div_(4, rounding_mode="floor")
    z[0].fill_(y[0]).relu_()
    return (z,)


def logical(x, y):
    mask = x > 3
    mask |= x < 2
    mask &= y > 0
    mask.logical_not_()
    return (mask,)


PROGRAMS = [
    write_fresh,
    write_slice,
    write_row,
    write_chain,
    write_transposed,
    write_reshaped,
    write_parts,
    write_diagonal_and_narrow,
    read_before_and_after,
    two_aliases,
    write_through_full_slice,
    write_everything,
    logical,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_writes_to_fresh_tensors(program):
    gm, report = check(program, range_tensor(4, 3), range_tensor(3))
    assert report.rewritten
    assert not report.mutated_inputs
    assert not epilogue(gm)


@pytest.mark.parametrize("program", PROGRAMS)
def test_symbolic_sizes(program):
    gm = capture(program, range_tensor(4, 3), range_tensor(3), dynamic=True)
    functionalize(gm)
    assert not mutations(gm)
    assert_same(program, gm, range_tensor(4, 3), range_tensor(3))


def test_symbolic_sizes_stay_symbolic():
    def program(x):
        z = x + 1
        z.view(-1)[: x.shape[0]].mul_(2)
        z[1:] = x[0]
        return (z,)

    gm, _ = check(program, range_tensor(4, 3), dynamic=True)
    assert_same(program, gm, range_tensor(7, 5))


def test_operators_become_their_functional_counterparts():
    gm, report = check(write_fresh, range_tensor(4, 3), range_tensor(3))
    assert targets(gm) == [aten.mul.Tensor, aten.add.Tensor, aten.mul.Tensor]
    assert report.rewritten == ("add_", "mul_")


@pytest.mark.parametrize(
    ("in_place", "functional"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.div_.Tensor_mode, aten.div.Tensor_mode),
        (aten.scatter_.value, aten.scatter.value),
        (aten.index_put_.default, aten.index_put.default),
        (aten.__ior__.Tensor, aten.__or__.Tensor),
        (aten.bernoulli_.float, aten.bernoulli.p),
        (aten.normal_.default, aten.normal_functional.default),
        (aten.fill_.Scalar, aten.full_like.default),
        (aten.add.out, None),
        (aten._foreach_add_.List, None),
    ],
)
def test_functional_overload(in_place, functional):
    assert functional_overload(in_place) is functional


def test_linear_and_attention_stay_whole():
    def program(x, weight):
        q = torch.nn.functional.linear(x, weight)
        q[..., 1:] *= 2
        return (torch.nn.functional.scaled_dot_product_attention(q, q, q),)

    gm, _ = check(program, torch.randn(1, 2, 5, 4), torch.randn(4, 4))
    assert aten.linear.default in targets(gm)
    assert aten.scaled_dot_product_attention.default in targets(gm)


@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.int64, torch.int32)],
)
def test_in_place_keeps_the_dtype(dtype, other):
    def program(x, y):
        z = x * 2
        z.add_(y)
        z[0] = y[1]
        z[1].copy_(y[0])
        return (z,)

    _, report = check(program, range_tensor(2, 3, dtype=dtype), range_tensor(2, 3, dtype=other))
    assert len(report.rewritten) == 3


def test_comparison_in_place_keeps_the_dtype():
    check(lambda x: (x.clone().lt_(3.0),), range_tensor(2, 3))
    check(lambda x: (x.clone().div_(2, rounding_mode="floor"),), range_tensor(5, dtype=torch.int64))


# -- inputs ----------------------------------------------------------------------------------------


def test_inputs_are_written_in_order_before_the_output():
    def program(cache, counter, x):
        at = counter + torch.arange(x.shape[1])
        cache.index_copy_(1, at, x)
        seen = cache[:, :3] * 1
        counter.add_(x.shape[1])
        return cache * 2, seen, at

    inputs = torch.zeros(2, 8, 4), torch.tensor(3), torch.randn(2, 2, 4)
    gm, report = check(program, *inputs)
    assert report.mutated_inputs == tuple(node.name for node in list(gm.graph.nodes)[:2])
    assert [node.args[0].name for node in epilogue(gm)] == list(report.mutated_inputs)


def test_mutated_input_is_returned_with_its_new_value():
    def program(x):
        before = x + 0
        same = x.add_(1)
        return x, same, x[0], before, x.view(-1)

    check(program, range_tensor(2, 3))


def test_an_output_does_not_change_when_the_epilogue_runs():
    def program(x, y):
        held = torch.empty_like(x)
        held.copy_(x)
        x.add_(1)
        rows = torch.empty_like(y)
        rows[:] = y
        y.copy_(x)
        return held, rows

    check(program, range_tensor(2, 3), range_tensor(2, 3))


def test_inputs_can_be_swapped():
    def program(x, y):
        held = x.clone()
        x.copy_(y)
        y.copy_(held)
        return ()

    _, report = check(program, range_tensor(3), range_tensor(3) * 10)
    assert len(report.mutated_inputs) == 2


def test_input_that_gets_what_another_input_was():
    def program(x, y):
        y.copy_(x)
        x.zero_()
        return (y * 1,)

    check(program, range_tensor(3), range_tensor(3) * 10)


def test_view_of_an_input():
    def program(x):
        x[1:, 0].mul_(3)
        x.t()[2] = 0
        return (x.sum(),)

    _, report = check(program, range_tensor(3, 4))
    assert len(report.mutated_inputs) == 1


def test_non_contiguous_input():
    def program(x):
        x.add_(1)
        flat = x.reshape(-1)
        flat.mul_(2)
        return flat, x[0]

    x = range_tensor(4, 3).t()
    gm = capture(program, x)
    functionalize(gm)
    ours, theirs = range_tensor(4, 3).t(), range_tensor(4, 3).t()
    torch.testing.assert_close(gm(ours), program(theirs))
    torch.testing.assert_close(ours, theirs)


def test_view_of_values_whose_strides_changed():
    def program(x):
        z = x.t() + 0  # strides of a transposed tensor
        first, second = z.split(2, dim=0)
        first.add_(second)
        copied = torch.empty_like(x)
        copied.copy_(x.t().reshape(3, 4).t().reshape(4, 3).t())
        return z.t().view(-1), z, (z * 2).t().view(-1), (copied * 2).view(-1)

    check(program, range_tensor(3, 4))


def test_a_buffer_is_written_too():
    gm = capture(lambda x: x + torch.tensor([1.0, 2.0]), range_tensor(2))
    constant = next(node for node in gm.graph.nodes if node.op == "get_attr")
    lifted = constant.next
    assert lifted.target is aten.lift_fresh_copy.default
    with gm.graph.inserting_before(lifted):
        call = gm.graph.call_function(aten.add_.Tensor, (constant, 1))
    lifted.args = (call,)
    call.meta["val"] = constant.meta["val"]
    gm.recompile()
    report = functionalize(gm)
    assert report.mutated_inputs == (constant.name,)
    assert gm(range_tensor(2)).tolist() == [3.0, 5.0]
    assert gm(range_tensor(2)).tolist() == [4.0, 6.0]


# -- clutter ---------------------------------------------------------------------------------------


def test_aliases_of_constants_and_values_go():
    def program(x):
        z = (x * torch.tensor(2.0)).detach()
        return (torch.nn.functional.dropout(torch.ops.aten.alias(z), 0.5, training=False).detach() + 1,)

    gm, report = check(program, range_tensor(3))
    assert targets(gm) == [aten.mul.Tensor, aten.add.Tensor]
    assert not report.rewritten


def test_a_constant_is_not_handed_out():
    gm = capture(lambda x: (x, torch.tensor([1.0, 2.0])), range_tensor(2))
    functionalize(gm)
    gm(range_tensor(2))[1].zero_()
    assert gm(range_tensor(2))[1].tolist() == [1.0, 2.0]


def test_random_operators_run_once_and_in_order():
    def program(x):
        noise = torch.empty_like(x).uniform_()
        torch.rand(3)
        coin = torch.empty_like(x).bernoulli_(0.5)
        noise[0].mul_(2)
        return noise, coin, torch.rand_like(x)

    gm = capture(program, range_tensor(4, 3))
    functionalize(gm)
    torch.manual_seed(0)
    expected = program(range_tensor(4, 3))
    torch.manual_seed(0)
    torch.testing.assert_close(gm(range_tensor(4, 3)), expected, rtol=0, atol=0)


def test_new_nodes_say_where_they_come_from():
    gm = capture(write_row, range_tensor(4, 3), range_tensor(3))
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {"layer": (node.name, object)}
    before = {node.name for node in gm.graph.nodes}
    functionalize(gm)
    (new,) = (node for node in gm.graph.nodes if node.name not in before)
    assert new.target is aten.select_scatter.default
    assert new.meta["nn_module_stack"]["layer"][0] == "copy_"
    assert new.meta["val"].shape == (4, 3)
