"""A functionalised graph does what the captured program did, to its outputs and to its inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quarot_fx.aliasing import functional_overload, written_nodes
from quarot_fx.functionalize import functionalize
from quarot_fx.graph import FROZEN

aten = torch.ops.aten
LIBRARY = torch.library.Library("functionalize_test", "DEF")
LIBRARY.define("bump_(Tensor(a!) x) -> ()")
LIBRARY.impl("bump_", lambda x: [x.add_(100)].clear(), "CompositeExplicitAutograd")
torch.library.register_fake("functionalize_test::bump_", lambda x: None, lib=LIBRARY)
bump_ = torch.ops.functionalize_test.bump_


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
        (bump_.default, None),
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


# -- what stays ------------------------------------------------------------------------------------


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
        aten.mul.Tensor,
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
    assert {"mul", "add_"} < set(report.frozen)
    assert all("mutates its operands" in reason for reason in report.frozen.values())


# -- any program -----------------------------------------------------------------------------------

VIEWS = [
    lambda t, k: t.t() if t.dim() == 2 else t,
    lambda t, k: t[k % t.shape[0]] if t.dim() > 1 else t,
    lambda t, k: t[k % t.shape[0] :],
    lambda t, k: t[..., : 1 + k % t.shape[-1]],
    lambda t, k: t[:: 1 + k % 2],
    lambda t, k: t.unsqueeze(k % (t.dim() + 1)) if t.dim() < 3 else t,
    lambda t, k: t.squeeze(),
    lambda t, k: t.view(-1) if t.is_contiguous() else t,
    lambda t, k: t.reshape(-1, t.shape[0]),
    lambda t, k: t.transpose(0, -1),
    lambda t, k: t.chunk(2, dim=k % t.dim())[-1],
    lambda t, k: t.unbind(0)[k % t.shape[0]] if t.dim() > 1 else t,
    lambda t, k: t.diagonal() if t.dim() == 2 else t,
    lambda t, k: t.detach(),
    lambda t, k: t.contiguous(),
    lambda t, k: t.type_as(t),
    lambda t, k: t.flatten(),
    lambda t, k: t * 2,  # has the strides of t, which later views rely on
]
WRITES = [
    lambda t, other: t.add_(3),
    lambda t, other: t.mul_(-2),
    lambda t, other: t.zero_(),
    lambda t, other: t.fill_(5),
    lambda t, other: t.copy_(other),
    lambda t, other: t.sub_(other),
    lambda t, other: t.masked_fill_(other > 0, 1.5),
]
STEPS = st.lists(
    st.tuples(st.sampled_from(["view", "write", "read"]), *[st.integers(0, 1000)] * 4),
    min_size=1,
    max_size=14,
)


def broadcasts(source, target):
    if source.dim() > target.dim():
        return False
    return all(a in (1, b) for a, b in zip(reversed(source.shape), reversed(target.shape), strict=False))


def interpret(steps, fresh):
    """Return the program that a list of steps stands for, over two matrices."""

    def program(x, y):
        bases = [x * 1, y] if fresh else [x, y]
        pool = [(0, bases[0]), (1, bases[1])]  # (which memory, tensor)
        reads = []
        for kind, which, operator_index, other_index, k in steps:
            memory, tensor = pool[which % len(pool)]
            if kind == "view" and tensor.dim() > 0 and tensor.numel() > 0:
                view = VIEWS[operator_index % len(VIEWS)](tensor, k)
                is_copy = view.untyped_storage()._cdata != tensor.untyped_storage()._cdata
                pool.append((len(pool) + 2 if is_copy else memory, view))
            elif kind == "write" and tensor.numel() > 0:
                sources = [t for m, t in pool if m != memory and broadcasts(t, tensor)]
                other = sources[other_index % len(sources)] if sources else tensor.clone()
                pool.append((memory, WRITES[operator_index % len(WRITES)](tensor, other)))
            elif kind == "read":
                reads.append(tensor.sum() + k)
        return [*reads, *(tensor for _, tensor in pool)]

    return program


@settings(max_examples=150, deadline=None)
@given(STEPS, st.booleans())
def test_any_program(steps, fresh):
    check(interpret(steps, fresh), range_tensor(3, 4), -range_tensor(4, 3))


# -- models ----------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


class Recorder:
    """A backend that functionalises and runs what it is given."""

    def __init__(self):
        self.graphs, self.reports = [], []

    def __call__(self, gm, example_inputs):
        fakes = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        captured = trace(fx.Interpreter(gm).run, fakes)
        assert_captured = [node.target for node in captured.graph.nodes if written_nodes(node)]
        self.reports.append(functionalize(captured))
        self.graphs.append((captured, assert_captured))
        return captured.forward


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def tiny_model(name, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("dynamic", [False, True])
def test_decode_step_with_a_static_cache(dynamic):
    model = tiny_model("Llama")
    from transformers import StaticCache

    backend = Recorder()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    prompt, tokens = torch.randint(0, 64, (2, 5)), torch.randint(0, 64, (3, 2, 1))
    with torch.no_grad():
        for cache in caches:
            model(prompt, past_key_values=cache)
        for token in tokens:
            expected = model(token, past_key_values=caches[0]).logits
            actual = compiled(token, past_key_values=caches[1]).logits
            torch.testing.assert_close(actual, expected)
    for theirs, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    (gm, captured), report = backend.graphs[-1], backend.reports[-1]
    assert aten.index_copy_.default in captured
    assert not mutations(gm)
    assert not report.frozen
    assert len(report.mutated_inputs) == len(epilogue(gm)) >= 2 * model.config.num_hidden_layers
    assert targets(gm).count(aten.scaled_dot_product_attention.default) == model.config.num_hidden_layers
    assert targets(gm).count(aten.linear.default) == 7 * model.config.num_hidden_layers + 1


def test_mixture_of_experts():
    model = tiny_model("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    backend = Recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits
        )
    ((gm, captured),) = backend.graphs
    assert captured
    assert not mutations(gm)
    assert not backend.reports[0].frozen
