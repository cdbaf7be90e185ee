"""Functionalisation of random programs, and of models."""

import pytest
import torch
from captures import check, epilogue, mutations, range_tensor, targets, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from torch import fx

from quarot_fx.aliasing import written_nodes
from quarot_fx.functionalize import functionalize

aten = torch.ops.aten


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


@pytest.mark.parametrize("dynamic", [False, True])
def test_decode_step_with_a_static_cache(dynamic):
    model = tiny_model("llama")
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
    model = tiny_model("mixtral")
    backend = Recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    ((gm, captured),) = backend.graphs
    assert captured
    assert not mutations(gm)
    assert not backend.reports[0].frozen
