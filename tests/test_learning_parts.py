"""What learning is made of: quantisation with a gradient, steps on the manifold, pieces of a graph, and the network."""

from __future__ import annotations

import pytest
import torch
from graphs import Decoder, fill
from torch import nn

from quarot_fx.calibration.programs import capture_programs
from quarot_fx.config import QuantScheme, QuarotConfig
from quarot_fx.graph import value
from quarot_fx.learning.cayley import CayleyAdam
from quarot_fx.learning.learn import OF_WEIGHTS, _free_bases, _network
from quarot_fx.learning.losses import cross_entropy, divergence
from quarot_fx.learning.network import attend_in_bfloat16
from quarot_fx.learning.options import LearningOptions
from quarot_fx.learning.segments import segments
from quarot_fx.learning.straight_through import quantize_straight_through
from quarot_fx.ops import quantize_asymmetric, quantize_symmetric
from quarot_fx.rotation import Rotation

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- quantisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_ops(symmetric, group, dtype):
    x = randn(3, 32, dtype=dtype)
    quantize = quantize_symmetric if symmetric else quantize_asymmetric
    codes, scale, *zero = quantize(x, 4, group, 0.9)
    expected = torch.ops.quarot.dequantize(codes, scale, zero[0] if zero else None, dtype)
    actual = quantize_straight_through(x, QuantScheme(4, group, symmetric, 0.9))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


def test_rounding_lets_gradients_pass_and_what_is_clipped_pulls_at_the_range():
    x = torch.tensor([[0.0, 1.2, -3.3, 7.0]], dtype=torch.float64)
    inside, clipped = QuantScheme(4, None, True, 1.0), QuantScheme(4, None, True, 3 / 7)
    with torch.enable_grad():
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(quantize_straight_through(x, inside)[0, 1], x)
        # the scale is |x_3| / 7: its error, (1 - 1.2), passes to x_3
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, 0.0, -0.2 / 7]], dtype=torch.float64))
        (gradient,) = torch.autograd.grad(quantize_straight_through(x, clipped)[0, 3], x)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0, 3 / 7]], dtype=torch.float64))


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5, dtype=torch.bool).tril(), torch.zeros(5, 5)])
def test_attention_in_bfloat16(mask):
    query, key, value = (randn(1, 2, 5, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.5)
    actual = attend_in_bfloat16((query, key, value, mask), {"scale": 0.5})
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


# -- steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 33])
def test_matrices_stay_orthogonal(order):
    optimizer = CayleyAdam([Rotation("random", order).matrix(), torch.eye(4, dtype=torch.float64)])
    for step in range(200):
        optimizer.step([randn(order, order, seed=step, dtype=torch.float32), randn(4, 4, seed=step)], 0.3)
    for matrix in optimizer.matrices:
        identity = torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-12, rtol=0)
    assert order == 1 or (optimizer.matrices[0] - Rotation("random", order).matrix()).abs().max() > 0.1


def test_the_nearest_rotation_is_found():
    """Of Procrustes' problem, |Q A - B|^2, which the gradient 2 (Q A - B) A^T leads to the solution of."""
    a, wanted = randn(16, 64), Rotation("random", 16, 1).matrix()
    wanted = wanted * torch.where(torch.arange(16) == 0, torch.linalg.det(wanted).sign(), 1)[:, None]
    b, steps = wanted @ a, 400
    optimizer = CayleyAdam([torch.eye(16, dtype=torch.float64)])
    for step in range(steps):
        (q,) = optimizer.matrices
        optimizer.step([2 * (q @ a - b) @ a.T], 0.1 * (1 - step / steps))
    torch.testing.assert_close(optimizer.matrices[0], wanted, atol=1e-2, rtol=0)


def test_a_matrix_without_gradient_stays():
    start = Rotation("random", 8).matrix()
    optimizer = CayleyAdam([start])
    optimizer.step([torch.zeros(8, 8)], 0.1)
    torch.testing.assert_close(optimizer.matrices[0], start, atol=1e-15, rtol=0)


# -- the network ---------------------------------------------------------------------------------------

TOKENS = torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def programs():
    return capture_programs(fill(Decoder()), TOKENS, QuarotConfig(), OF_WEIGHTS)


def network_of(programs, **options):
    """The network, the matrices of its free bases, and its input."""
    how = LearningOptions(batch=2, **options)
    network, token_input = _network(programs, TOKENS, how)
    free = _free_bases(programs, how)
    matrices = {number: Rotation.parse(name).matrix().float() for number, (name, _) in free.items()}
    return network, matrices, {token_input: TOKENS}


@pytest.mark.parametrize("recompute", [True, False])
def test_it_computes_what_the_programs_do(programs, recompute):
    network, matrices, varying = network_of(programs, recompute=recompute)
    for program, quantized in ((programs.rotated, False), (programs.quantized, True)):
        (expected,) = program.graph_module(TOKENS)
        torch.testing.assert_close(network(varying, matrices, quantized), expected, atol=1e-4, rtol=1e-4)


def test_all_rotations_are_equal_to_the_float_model(programs):
    """Nothing but rounding tells rotations apart: without it any is as good, and no gradient turns one."""
    network, matrices, varying = network_of(programs)
    expected = network(varying, matrices, quantized=False)
    others = {number: Rotation("random", len(q), 7).matrix().float() for number, q in matrices.items()}
    torch.testing.assert_close(network(varying, others, quantized=False), expected, atol=1e-4, rtol=1e-4)
    assert (network(varying, others) - network(varying, matrices)).abs().max() > 0.01
    turns = {}
    for quantized in (False, True):
        with torch.enable_grad():
            leaves = {number: q.requires_grad_() for number, q in matrices.items()}
            loss = cross_entropy(network(varying, leaves, quantized), TOKENS)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        products = [q.detach().T @ g for q, g in zip(leaves.values(), gradients, strict=True)]
        turns[quantized] = max((p - p.T).abs().max().item() for p in products)
    assert turns[False] < 1e-3 * turns[True]


def test_losses():
    logits, other = randn(2, 5, 7, dtype=torch.float32), randn(2, 5, 7, seed=1, dtype=torch.float32)
    tokens = torch.arange(10).view(2, 5) % 7
    assert divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)
    probabilities = other.softmax(-1)
    expected = (probabilities * (other.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(divergence(logits, other), expected)
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(cross_entropy(logits, tokens), -picked.mean())


def test_a_graph_is_cut_where_little_passes(programs, monkeypatch):
    monkeypatch.setattr("quarot_fx.learning.segments.NODES", 20)
    nodes = [node for node in programs.rotated.graph.nodes if node.op == "call_function"]
    pieces = segments(nodes, lambda node: node.all_input_nodes, [nodes[-1]])
    assert len(pieces) == len(nodes) // 20 > 2
    assert [node for piece in pieces for node in piece] == nodes
    for place in range(1, len(pieces)):
        before = {node for piece in pieces[:place] for node in piece}
        read = {source for piece in pieces[place:] for node in piece for source in node.all_input_nodes}
        stream = [node for node in before & read if value(node).shape == (2, 12, 8)]
        assert len(stream) <= 2
