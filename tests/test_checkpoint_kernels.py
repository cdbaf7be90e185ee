"""A checkpoint on the device that kernels run on: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from models import random_token_ids, tiny_model

import quarot_fx

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fresh_dynamo")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_logits_are_equal(tmp_path):
    pytest.importorskip("triton")
    options = {"nested_backend": "eager"}
    model, ids = tiny_model("llama", num_hidden_layers=1).to(DEVICE), random_token_ids(1, 5).to(DEVICE)
    model.compile(backend="quarot", options=options, dynamic=False)
    expected = model(input_ids=ids, use_cache=False).logits
    quarot_fx.save(model, tmp_path / "checkpoint")
    torch._dynamo.reset()
    loaded = quarot_fx.load(tmp_path / "checkpoint", device=DEVICE, dynamic=False, **options)
    assert {parameter.device.type for parameter in loaded.parameters()} == {DEVICE}
    logits = loaded(input_ids=ids, use_cache=False).logits
    assert expected.isfinite().all()
    assert torch.equal(logits, expected)
