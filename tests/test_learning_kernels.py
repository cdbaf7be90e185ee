"""Learning on the device that kernels run on: on a GPU if there is one, where rounding and attention are others."""

from __future__ import annotations

import pytest
import torch
from graphs import Decoder, fill

import quarot_fx
from quarot_fx.config import QuantScheme
from quarot_fx.learning.straight_through import _compiled, _quantize

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fresh_dynamo")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_compiled_rounding_is_the_same():
    scheme = QuantScheme(4, 16, False, 0.9)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, 5, 64, generator=generator).to(DEVICE) for _ in range(2))
    with torch.enable_grad():
        x.requires_grad_()
        expected, actual = _quantize(x, scheme), _compiled()(x, scheme)
        gradients = [torch.autograd.grad((one * weight).sum(), x)[0] for one in (expected, actual)]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="compares a GPU with the CPU")
def test_rotations_and_scales_are_learned_as_on_a_cpu():
    tokens = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", DEVICE):
        model, data = fill(Decoder()).to(device), tokens.to(device)
        learned = quarot_fx.learn_rotations(model, data, learning={"steps": 2, "batch": 2})
        tuned = quarot_fx.tune_scales(model, data, tuning={"steps": 2, "batch": 2, "interval": 1})
        assert quarot_fx.rewrite(model, data[:1], **tuned.options)(data[:1])[0].isfinite().all()
        found[device] = torch.tensor([*learned.losses, *tuned.losses, *tuned.held_out.values()])
    torch.testing.assert_close(found[DEVICE], found["cpu"], atol=0.1, rtol=0.1)
