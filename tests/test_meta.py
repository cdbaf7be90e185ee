"""A model on the meta device is planned exactly as the same model with its weights, and none is made."""

import pytest
import torch
from graphs import Decoder, fill, ids
from models import random_token_ids, tiny_model
from transformers import AutoModelForCausalLM

import quarot_fx
from quarot_fx.errors import UnboundParameterError
from quarot_fx.graph import PARAMETER, stored_tensor
from quarot_fx.meta import is_on_meta

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def report_of(graph):
    """Return all that a report says, except how long it took."""
    report = graph.quarot.as_dict()
    for one in report["passes"]:
        del one["seconds"]
    return report


def stored(graph):
    """Return the tensors that a graph holds for parameters of the model, by name."""
    nodes = [node for node in graph.graph.find_nodes(op="get_attr") if PARAMETER in node.meta]
    return {str(node.target): stored_tensor(node) for node in nodes}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("llama", {"stop_after": "rotate"}), ("phi3", {"w_sym": False}), ("gpt2", {}), ("mixtral", {})],
)
def test_the_plan_and_the_report_are_those_of_the_model_with_weights(model_type, options):
    real = tiny_model(model_type)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(real.config).float().eval()
    inputs = {"input_ids": random_token_ids(), "use_cache": False}
    with_weights = quarot_fx.rewrite(real, inputs, **options)
    without = quarot_fx.rewrite(meta, inputs, **options)
    assert without.quarot.plan.to_json() == with_weights.quarot.plan.to_json()
    assert report_of(without) == report_of(with_weights)
    assert without.code == with_weights.code
    assert {n: (t.shape, t.dtype) for n, t in stored(without).items()} == {
        n: (t.shape, t.dtype) for n, t in stored(with_weights).items()
    }


@pytest.fixture
def decoder():
    return fill(Decoder()).to("meta")


def test_nothing_is_made_of_weights_that_are_not_there(decoder):
    graph = quarot_fx.rewrite(decoder, ids())
    assert len(stored(graph)) > len(dict(decoder.named_parameters()))  # codes and scales
    assert all(tensor.is_meta for tensor in stored(graph).values())
    assert is_on_meta(decoder), "the model is left as it was"


def test_parameters_that_no_pass_changes_are_the_users_own(decoder):
    graph = quarot_fx.rewrite(decoder, ids(), rotation="none", w_bits=16)
    own = {id(parameter) for parameter in decoder.parameters()}
    assert id(decoder.embedding.weight) in {id(tensor) for tensor in stored(graph).values()} & own


def test_inputs_may_be_on_meta_or_not(decoder):
    plans = [quarot_fx.explain(decoder, inputs).plan for inputs in (ids(), ids().to("meta"))]
    assert plans[0] == plans[1]
    assert plans[0].online


def test_buffers_may_have_data(decoder):
    del decoder.block.query.bias
    decoder.block.query.register_buffer("bias", torch.ones(16))
    assert quarot_fx.explain(decoder, ids()).plan.online


def test_tied_weights_stay_tied(decoder):
    decoder.head.weight = decoder.embedding.weight
    before, _ = quarot_fx.explain(decoder, ids()).weight_bytes
    assert before == sum(parameter.nbytes for parameter in decoder.parameters())


def test_a_check_needs_weights(decoder):
    assert quarot_fx.explain(decoder, ids()).passes[0].difference is None
    assert quarot_fx.explain(fill(Decoder()), ids()).passes[0].difference == 0
    with pytest.raises(UnboundParameterError, match=r"'embedding.weight' is on the meta device.*check=False"):
        quarot_fx.explain(decoder, ids(), check=True)
