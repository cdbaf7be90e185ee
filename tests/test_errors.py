"""Every mistake of a user meets a typed error that says what, where and what to do; and nothing is lost."""

import copy

import pytest
import torch
from torch import nn

import quarot_fx
from quarot_fx import errors


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + x


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def model():
    return Model().eval()


def run(model, x=None, mode=None, **options):
    """Compile and call, under no_grad, as a user would."""
    x = torch.randn(2, 8) if x is None else x
    kwargs = {"mode": mode} if mode else {"options": {"nested_backend": "eager", **options}}
    with torch.no_grad():
        return torch.compile(model, backend="quarot", **kwargs)(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"w_bit": 4}, errors.UnknownOptionError, "unknown option 'w_bit'. Did you mean 'w_bits'?"),
        ({"w_bits": 9}, errors.OptionError, "w_bits=9: must be 2 to 8, or 16"),
        ({"kv_bits": 1}, errors.OptionError, "k_bits=1"),
        ({"a_clip": 1.5}, errors.OptionError, "a_clip=1.5"),
        ({"rotation": "hadamart"}, errors.UnknownOptionError, "Did you mean 'hadamard'?"),
        ({"nested_backend": "inducter"}, errors.UnknownOptionError, "Did you mean 'inductor'?"),
        ({"stop_after": "rotat"}, errors.UnknownOptionError, "Did you mean 'rotate'?"),
        ({"disabled_passes": ("fold-gain",)}, errors.UnknownOptionError, "Did you mean 'fold-gains'?"),
        ({"overrides": {"*.first": {"wbits": 8}}}, errors.UnknownOptionError, "Did you mean 'w_bits'?"),
        ({"w_group": 5}, errors.GroupSizeError, "w_group=5 does not divide the 8 elements that first.weight"),
        ({"a_group": 5}, errors.GroupSizeError, "input of first.weight"),
    ],
)
def test_options(model, options, error, message):
    with pytest.raises(error) as caught:
        run(model, **options)
    assert message in str(caught.value)


def test_an_unknown_mode(model):
    with pytest.raises(errors.UnknownOptionError, match="Did you mean 'max-autotune'"):
        run(model, mode="max-autotun")


def test_training_mode_names_the_module(model):
    with pytest.raises(errors.TrainingModeError, match=r"the Model is in training mode.*model\.eval\(\)"):
        run(model.train())
    model.eval().second.train()
    torch._dynamo.reset()
    with pytest.raises(errors.TrainingModeError, match=r"^second is in training mode"):
        run(model)


def test_an_input_that_requires_grad(model):
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(errors.InputRequiresGradError, match=r"requires grad"):
        torch.compile(model, backend="quarot", options={"nested_backend": "eager"})(x)


def test_an_input_that_requires_grad_needs_no_gradient_under_no_grad(model):
    x = torch.randn(2, 8, requires_grad=True)
    with torch.no_grad():
        y = torch.compile(model, backend="quarot", options={"nested_backend": "eager"})(x)
    assert not y.requires_grad


def test_parameters_that_require_grad_are_normal(model):
    assert not torch.compile(model, backend="quarot", options={"nested_backend": "eager"})(
        torch.randn(2, 8)
    ).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model, bad):
    with torch.no_grad():
        model.second.weight[3, :2] = bad
    with pytest.raises(errors.NonFiniteWeightError, match=r"'second.weight' has 2 element\(s\)"):
        run(model)


def test_a_failed_model_does_not_stand_in_the_way_of_another(model):
    """Dynamo's guards look at no content of a parameter: what it kept of the first, it would run for the second."""
    other, x = copy.deepcopy(model), torch.randn(2, 8)
    with torch.no_grad():
        model.second.weight[3, :2] = float("nan")
    with pytest.raises(errors.NonFiniteWeightError):
        run(model, x)
    assert run(other, x).isfinite().all()
    with pytest.raises(errors.NonFiniteWeightError):
        run(model, x)


def test_a_model_compiles_once_its_fault_is_mended(model):
    compiled = torch.compile(model, backend="quarot", options={"nested_backend": "eager"})
    with torch.no_grad():
        saved = model.second.weight[3, 0].clone()
        model.second.weight[3, 0] = float("inf")
        for _ in range(2):
            with pytest.raises(errors.NonFiniteWeightError):
                compiled(torch.randn(2, 8))
        model.second.weight[3, 0] = saved
        assert compiled(torch.randn(2, 8)).isfinite().all()


def test_an_error_of_a_later_graph_is_typed(model):
    def broken(x):
        x = torch.sin(x)
        torch._dynamo.graph_break()
        return model(x)

    with torch.no_grad():
        model.second.weight[3, 0] = float("nan")
        with pytest.raises(errors.NonFiniteWeightError) as caught:
            torch.compile(broken, backend="quarot")(torch.randn(2, 8))
    assert caught.value.__suppress_context__


def test_an_error_without_dynamo_is_typed_too(model):
    with pytest.raises(errors.UnknownOptionError, match="Did you mean 'w_bits'"):
        quarot_fx.backend.quarot(torch.fx.symbolic_trace(model), [torch.randn(2, 8)], options={"w_bit": 4})


def test_a_parameter_on_the_meta_device():
    with torch.device("meta"):
        model = Model().eval()
    with pytest.raises(errors.UnboundParameterError, match=r"'first\.\w+' is on the meta device"):
        run(model, torch.randn(2, 8, device="meta"))


def test_an_inference_tensor_as_a_parameter():
    with torch.inference_mode():
        model = Model().eval()
    with pytest.raises(errors.UnboundParameterError, match=r"outside of torch\.inference_mode"):
        run(model)


def test_a_model_without_parameters():
    with pytest.raises(errors.NotOneGraphError, match="0 graphs"):
        quarot_fx.rewrite(nn.ReLU().eval(), torch.randn(2, 8))


def test_a_model_that_breaks_into_graphs(model):
    class Broken(Model):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(x)

    with pytest.raises(errors.NotOneGraphError, match=r"2 graphs.*backend='quarot'"):
        quarot_fx.rewrite(Broken().eval(), torch.randn(2, 8))


def test_a_failure_inside_the_nested_backend_has_a_name(model, monkeypatch):
    def broken(gm, inputs):
        raise torch._subclasses.fake_tensor.UnsupportedFakeTensorException("no")  # Dynamo would break the graph on it

    torch._dynamo.list_backends()  # entry points are looked for once, and must not be lost with the copies below
    registry = torch._dynamo.backends.registry
    monkeypatch.setattr(registry, "_COMPILER_FNS", dict(registry._COMPILER_FNS))
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    torch._dynamo.register_backend(broken)
    with pytest.raises(errors.NestedBackendError, match="'broken' failed"):
        run(model, nested_backend="broken")


def test_a_failure_inside_capture_has_a_name(model, monkeypatch):
    def broken(*_, **__):
        raise torch._subclasses.fake_tensor.DataDependentOutputException("no")

    monkeypatch.setattr("quarot_fx.capture.make_fx", broken)
    with pytest.raises(errors.CaptureError, match=r"DataDependentOutputException"):
        run(model)


def test_an_error_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 8)
    expected = model(x)
    with pytest.raises(errors.GroupSizeError):
        run(model, a_group=5)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(model(x), expected)


def test_compilation_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    run(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_every_error_is_a_quarot_error_with_its_details():
    error = errors.GroupSizeError(option="w_group", group=5, size=8, where="a")
    assert isinstance(error, quarot_fx.QuarotError)
    assert (error.option, error.group, error.size) == ("w_group", 5, 8)
