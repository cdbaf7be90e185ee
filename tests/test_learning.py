"""Learned rotations, from a model to the graphs that use them."""

from __future__ import annotations

import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, fill, linear
from models import random_token_ids, tiny_model
from torch import nn
from trained import babyllama, divergence, stories
from transformers import DynamicCache

import quarot_fx
from quarot_fx.errors import (
    CalibrationDataError,
    LearnedRotationError,
    LearningError,
    NotCalibratedError,
    NothingToLearnError,
    OptionError,
    UnknownOptionError,
)
from quarot_fx.float64 import relative_difference
from quarot_fx.learning.options import LearningOptions
from quarot_fx.learning.rotations import LearnedRotation, LearnedRotations
from quarot_fx.learning.training import batches, cut
from quarot_fx.rotation import Rotation

SHORT = {"steps": 2, "batch": 2, "rate": 0.3}
EAGER = {"nested_backend": "eager"}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def ids(count=4, length=12, seed=0):
    """Token ids for :class:`Decoder`."""
    return torch.randint(16, (count, length), generator=torch.Generator().manual_seed(seed))


def learn(model, tokens, learning=SHORT, **options):
    return quarot_fx.learn_rotations(model, tokens, learning=learning, **options)


@pytest.fixture
def learned():
    """A model, and rotations that were learned for it."""
    model = fill(Decoder())
    return model, learn(model, ids())


@pytest.fixture(scope="module")
def trained():
    """A trained model, sequences that it wrote itself, and rotations that were learned on some of them."""
    model, tokens = babyllama(), stories(64, 96)
    return model, tokens, learn(model, tokens[:40], {"steps": 30, "batch": 4, "rate": 0.3, "loss": "divergence"})


def perplexity(model, tokens, **options):
    """Return the perplexity of tokens [n, length] under the quantised model."""
    logits = quarot_fx.rewrite(model, {"input_ids": tokens, "use_cache": False}, **options)(tokens)[0]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


# -- what it is for ------------------------------------------------------------------------------------


def test_the_loss_falls(trained):
    _, _, learned = trained
    assert len(learned.losses) == 30
    assert sum(learned.losses[-10:]) < 0.95 * sum(learned.losses[:10])


def test_a_trained_model_predicts_better_than_with_random_rotations(trained):
    """On sequences that nothing was learned on, with weights in float, as while it was learned, and rounded by GPTQ."""
    model, tokens, learned = trained
    test, known = tokens[40:], {"learned_rotations": learned}
    assert divergence(model, test, w_bits=16, **known) < 0.95 * divergence(model, test, w_bits=16)
    assert perplexity(model, test, w_bits=16, **known) < 0.98 * perplexity(model, test, w_bits=16)
    gptq = {"w_rounding": "gptq"}
    for options in ({}, known):
        quarot_fx.calibrate(model, tokens[:16], **options)
    assert divergence(model, test, **gptq, **known) < divergence(model, test, **gptq)


def test_the_same_seed_gives_the_same_rotations():
    model = fill(Decoder())
    first, again, other = (learn(model, ids(), {**SHORT, "seed": seed, "batch": 1}) for seed in (0, 0, 1))
    assert first == again
    assert first.losses == again.losses
    assert first != other
    assert first != learn(model, ids(), {**SHORT, "batch": 1}, seed=1)  # another start


def test_long_sequences_arecut():
    tokens = torch.arange(14).view(2, 7)
    assert cut(tokens, 3).tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert torch.equal(cut(tokens, None), tokens)
    assert torch.equal(cut(tokens, 8), tokens)
    model = fill(Decoder())
    assert learn(model, ids(2, 13), {**SHORT, "length": 6}) == learn(model, cut(ids(2, 13), 6))


def test_all_sequences_come_in_turn():
    tokens = torch.arange(5)[:, None]
    found = list(batches(tokens, 2, 5, 0))
    assert [len(batch) for batch in found] == [2] * 5
    seen = torch.cat(found).flatten()
    assert sorted(seen[:5].tolist()) == sorted(seen[5:].tolist()) == [0, 1, 2, 3, 4]
    assert seen[:5].tolist() != seen[5:].tolist()


# -- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi"])
def test_a_graph_in_learned_bases_computes_the_same(name):
    """Also with the mean of LayerNorm, biases, experts, parallel blocks and tied embeddings."""
    model, tokens = tiny_model(name), random_token_ids(2, 12)
    learned = learn(model, tokens)
    inputs = {"input_ids": tokens[:1], "use_cache": False}
    report = quarot_fx.explain(model, inputs, learned_rotations=learned, stop_after="rotate")
    assert {one.name: one.difference for one in report.passes}["rotate"] < 1e-9
    rotations = {str(one.rotation) for one in learned}
    assert len(rotations) >= 3  # the stream, and values of two layers
    assert rotations <= {basis.rotation for basis in report.plan.bases}
    for one in learned:
        matrix, order = one.rotation.matrix(), one.rotation.order
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12, rtol=0)
        begins = [Rotation(kind, order).matrix() for kind in ("hadamard", "random-hadamard")]
        assert all((matrix - begin).abs().max() > 0.01 for begin in begins)


def test_the_model_stays_as_it_is():
    model = fill(Decoder())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn(model, ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_float32_matmul_precision() == "highest"


def test_prompt_and_decoding_agree(graphs):
    model, tokens = tiny_model("llama", num_hidden_layers=1), random_token_ids(length=9)
    learned = learn(model, random_token_ids(4, 16, seed=1))
    options = {"learned_rotations": learned}
    whole = quarot_fx.rewrite(model, {"input_ids": tokens, "use_cache": False}, **options)(tokens)[0]
    compiled = torch.compile(model, backend="quarot", options={**EAGER, **options})
    cache = DynamicCache(config=model.config)
    steps = [compiled(input_ids=part, past_key_values=cache).logits for part in tokens.split([6, 1, 1, 1], dim=1)]
    assert graphs() > 1
    random = quarot_fx.rewrite(model, {"input_ids": tokens, "use_cache": False})(tokens)[0]
    assert relative_difference([torch.cat(steps, 1)], [whole]) < 1e-4 < relative_difference([random], [whole])


def test_codes_belong_to_the_rotations(learned):
    model, rotations = learned
    quarot_fx.calibrate(model, ids(), learned_rotations=rotations)
    gptq = {"w_rounding": "gptq"}
    assert quarot_fx.rewrite(model, ids(1), **gptq, learned_rotations=rotations)(ids(1))[0].isfinite().all()
    with pytest.raises(NotCalibratedError):
        quarot_fx.rewrite(model, ids(1), **gptq)
    with pytest.raises(NotCalibratedError):
        quarot_fx.rewrite(model, ids(1), **gptq, learned_rotations=learn(model, ids(seed=1)))


def test_learning_goes_on_where_it_is_told_to_start(learned):
    model, rotations = learned
    further = learn(model, ids(), {**SHORT, "steps": 1, "rate": 1e-6}, learned_rotations=rotations)
    for one, other in zip(rotations, further, strict=True):
        assert one.absorbed_by == other.absorbed_by
        assert 0 < (one.rotation.matrix() - other.rotation.matrix()).abs().max() < 1e-5


# -- what is learned -----------------------------------------------------------------------------------


def test_the_stream_and_values_are_learned_and_what_runs_online_is_not(learned):
    model, rotations = learned
    assert [one.rotation.order for one in rotations] == [WIDTH, WIDTH // 2]
    stream, values = rotations
    assert len(stream.absorbed_by) == 9
    assert [absorber.partition(" of ")[0] for absorber in values.absorbed_by] == [
        "block.value.weight axis 0 inner 1",
        "block.output.weight axis 1 inner 1",
    ]
    report = quarot_fx.explain(model, ids(1), learned_rotations=rotations, check=False)
    assert {t.rotation.partition("-")[0] for t in report.plan.online} == {"hadamard"}
    free = [linear for linear in report.linears if linear.rotated == "free"]
    assert {linear.reason for linear in free if linear.parameter != "head.weight"} == {"by a learned rotation"}
    assert f"rotations learned-{WIDTH}-* were learned (1 of them)" in str(report)
    assert f"learned-{WIDTH}-*" in str(rotations)
    assert "cross-entropy" in str(rotations)


def test_values_may_stay_as_they_are():
    model = fill(Decoder())
    rotations = learn(model, ids(), {**SHORT, "heads": False})
    assert [one.rotation.order for one in rotations] == [WIDTH]


@pytest.mark.parametrize("learning", [{"loss": "divergence"}, {"weights": "nearest"}, {"recompute": False}])
@pytest.mark.parametrize("options", [{}, {"a_group": 4, "w_group": 4, "a_sym": False, "w_sym": False, "kv_sym": True}])
def test_every_option_learns(learning, options):
    learned = learn(fill(Decoder()), ids(), {**SHORT, **learning}, **options)
    assert all(loss > 0 for loss in learned.losses)
    kept = learn(fill(Decoder()), ids(), {**SHORT, **learning, "recompute": True}, **options)
    if "recompute" in learning:
        for one, other in zip(learned, kept, strict=True):
            torch.testing.assert_close(one.rotation.matrix(), other.rotation.matrix(), atol=1e-3, rtol=0)


# -- mistakes ------------------------------------------------------------------------------------------


def test_nothing_to_learn():
    with pytest.raises(NothingToLearnError, match="nothing is quantised"):
        learn(fill(Decoder()), ids(), a_bits=16, kv_bits=16)
    with pytest.raises(NothingToLearnError, match=r"absorb none under these options. quarot_fx.explain"):
        learn(fill(Decoder()), ids(), rotation="none")


def test_a_model_without_logits():
    model = fill(Lambda(lambda m, ids: m.a(m.e(ids)).sum((1, 2)), e=nn.Embedding(16, WIDTH), a=linear(WIDTH)))
    with pytest.raises(LearningError, match=r"logits \[2, 12, vocabulary\]. Give a model that returns logits"):
        learn(model, ids(), overrides={"a": {"w_bits": 4}})


def test_a_loss_that_is_no_number():
    model = fill(Decoder())
    model.head.weight.mul_(1e38)
    with pytest.raises(LearningError, match="the loss is"):
        learn(model, ids())


def test_too_few_sequences():
    with pytest.raises(CalibrationDataError, match=r"4 sequences are less than a batch of 8\. Give more"):
        learn(fill(Decoder()), ids(), {"batch": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "option steps=0: must be an integer, 1 or more"),
        ({"batch": 1.5}, "must be an integer, 1 or more"),
        ({"length": 1}, "must be an integer, 2 or more"),
        ({"seed": -1}, "must be an integer, 0 or more"),
        ({"rate": 0}, r"must be an angle in \(0, 1\] radians"),
        ({"heads": 1}, "must be True or False"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        LearningOptions.from_options(options)


@pytest.mark.parametrize("options", [{"loss": "mse"}, {"weights": "gptq"}, {"stepps": 3}])
def test_options_that_there_are_not(options):
    with pytest.raises(UnknownOptionError, match="Known: "):
        LearningOptions.from_options(options)


def test_without_rotation_there_is_nothing_to_be_learned_for(learned):
    model, rotations = learned
    with pytest.raises(OptionError, match="rotation='none', which is to rotate nothing"):
        quarot_fx.rewrite(model, ids(1), learned_rotations=rotations, rotation="none")


def test_a_rotation_that_does_not_fit(learned):
    model, (stream, _) = learned
    small = LearnedRotations([LearnedRotation(Rotation.of_matrix(torch.eye(4)), stream.absorbed_by)])
    with pytest.raises(LearnedRotationError, match=rf"embedding.weight axis 1.* does not fit its {WIDTH} elements"):
        quarot_fx.rewrite(model, ids(1), learned_rotations=small)


def test_a_rotation_that_is_not_used_is_reported(learned):
    model, (stream, values) = learned
    other = LearnedRotations([stream, LearnedRotation(values.rotation, ("another.weight axis 0 inner 1",))])
    report = quarot_fx.explain(model, ids(1), learned_rotations=other, check=False)
    (decline,) = [one for report in report.passes for one in report.declined if "learned" in one.reason]
    assert decline.where == "another.weight axis 0 inner 1"
    assert "not used: this graph rotates it otherwise" in decline.reason


def test_quarot_cache_holds_values_rotated_by_a_hadamard():
    model, tokens = tiny_model("llama"), random_token_ids(2, 12)
    for heads in (True, False):
        learned = learn(model, tokens, {**SHORT, "heads": heads})
        compiled = torch.compile(model, backend="quarot", options={**EAGER, "learned_rotations": learned})
        torch._dynamo.reset()
        cache = quarot_fx.QuarotCache(model.config)
        if heads:
            with pytest.raises(LearnedRotationError, match=r"it holds them rotated by hadamard-16. Learn with heads=F"):
                compiled(input_ids=tokens, past_key_values=cache)
        else:
            assert compiled(input_ids=tokens, past_key_values=cache).logits.isfinite().all()
