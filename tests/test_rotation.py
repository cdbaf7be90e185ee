import hashlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quarot_fx import rotation as rotation_module
from quarot_fx.errors import (
    NotOrthogonalError,
    OptionError,
    RotationSizeError,
    UnknownMatrixError,
    UnknownOptionError,
)
from quarot_fx.rotation import Rotation

KINDS = ("hadamard", "random-hadamard", "random")
SMALL = (1, 2, 9, 10, 12, 14, 28, 36, 131, 387)
LARGE = (11008, 13696, 10007, 29568)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [*SMALL, 576, 1536])
def test_matrix_is_orthogonal(kind: str, order: int) -> None:
    q = Rotation(kind, order, seed=1).matrix()
    assert_close(q @ q.T, torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", LARGE)
def test_large_orders_keep_the_norm_and_invert(order: int) -> None:
    rotation, x = Rotation("random-hadamard", order), randn(3, order)
    y = rotation.apply(x)
    assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert_close(rotation.apply(y, inverse=True), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", SMALL)
@pytest.mark.parametrize("inverse", [False, True])
def test_apply_is_the_product_with_the_matrix(kind: str, order: int, inverse: bool) -> None:
    rotation = Rotation(kind, order, seed=2)
    q = rotation.matrix().T if inverse else rotation.matrix()
    x = randn(3, 2 * order * 5, 4).transpose(0, 2)
    factors = x.reshape(4, 2, order, 5, 3)
    expected = torch.einsum("aonib,nm->aomib", factors, q).reshape(x.shape)
    for dim in (1, -2):
        assert_close(rotation.apply(x, dim, 5, inverse), expected)
    row = randn(7, order)
    assert_close(rotation.apply(row, inverse=inverse), row @ q)


@pytest.mark.parametrize("text", ["hadamard-12", "hadamard-1", "random-hadamard-12-seed0", "random-12-seed0"])
def test_result_is_new_contiguous_and_of_the_same_dtype(text: str) -> None:
    rotation = Rotation.parse(text)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = randn(2, 12, dtype=dtype)
        for source in (x, randn(12, 2, dtype=dtype).mT):
            y = rotation.apply(source)
            assert y.dtype == dtype
            assert y.is_contiguous()
            assert y.data_ptr() != source.data_ptr()
    assert rotation.apply(torch.empty(0, 3, 12)).shape == (0, 3, 12)
    assert rotation.apply(torch.empty(3, 12, 0), dim=1).shape == (3, 12, 0)


def test_half_precision_is_rounded_once() -> None:
    rotation, x = Rotation("random-hadamard", 1536), randn(4, 1536, dtype=torch.bfloat16)
    assert torch.equal(rotation.apply(x), rotation.apply(x.float()).bfloat16())


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = torch.zeros(1536, dtype=torch.float64)
    x[77] = 1.0
    assert_close(Rotation("random-hadamard", 1536).apply(x).abs(), torch.full_like(x, 1536**-0.5))


# -- names and randomness --------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hadamard-1536", "random-hadamard-576-seed0", "random-64-seed3"])
def test_text_form_round_trips(text: str) -> None:
    assert str(Rotation.parse(text)) == text
    assert Rotation.parse(text) == Rotation.parse(str(Rotation.parse(text)))


@pytest.mark.parametrize(
    "text", ["", "hadamard", "hadamard-8-seed1", "hadamard-008", "random-64", "Hadamard-8", "random-8-seed-1"]
)
def test_other_texts_are_errors(text: str) -> None:
    with pytest.raises(UnknownOptionError, match="hadamard-<order>"):
        Rotation.parse(text)


def test_error_suggests_the_nearest_form() -> None:
    with pytest.raises(UnknownOptionError, match="Did you mean 'hadamard-<order>'"):
        Rotation.parse("hadamrd-1536")
    with pytest.raises(UnknownOptionError, match="Did you mean 'random-hadamard'"):
        Rotation("random_hadamard", 8)


def test_values_out_of_range_are_errors() -> None:
    with pytest.raises(OptionError, match="order=0"):
        Rotation("hadamard", 0)
    with pytest.raises(OptionError, match="seed=-1"):
        Rotation("random", 4, seed=-1)


def test_an_axis_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RotationSizeError, match=r"hadamard-12 .* axis 1 of shape \(2, 18\)"):
        Rotation("hadamard", 12).apply(torch.ones(2, 18), dim=1)
    with pytest.raises(RotationSizeError, match="12 x 2"):
        Rotation("hadamard", 12).apply(torch.ones(2, 36), inner=2)


def test_a_plain_hadamard_has_no_seed() -> None:
    assert Rotation("hadamard", 8, seed=5) == Rotation("hadamard", 8)


@pytest.mark.parametrize(
    ("rotation", "description", "flops"),
    [
        (Rotation("hadamard", 1536), "Hadamard 12 x 16 x 8", 36),
        (Rotation("hadamard", 9), "Hartley 9", 9),
        (Rotation("hadamard", 41088), "Hartley 107 x Hadamard 12 x 32", 151),
        (Rotation("hadamard", 167 * 64), "167 blocks of Hadamard 64", 64),
        (Rotation("hadamard", 10007), "identity", 0),
        (Rotation("random-hadamard", 576), "Hadamard 36 x 16 with random signs", 52),
        (Rotation("random", 64), "random orthogonal 64", 64),
    ],
)
def test_description_and_cost(rotation: Rotation, description: str, flops: float) -> None:
    assert rotation.description() == description
    assert rotation.flops_per_element == flops


def test_signs_are_the_same_on_every_machine() -> None:
    like = torch.empty((), dtype=torch.float64)
    signs = rotation_module._random_signs(Rotation("random-hadamard", 576), like)
    digest = hashlib.sha256(signs.to(torch.int8).numpy().tobytes()).hexdigest()
    assert digest == "3e491f3fa6e6ebd3c5566f6637b576ae1583eb0e23a6d427c92c4ce26e52ef79"
    assert signs[:8].tolist() == [1, -1, -1, 1, -1, 1, 1, -1]


def test_random_matrix_is_the_same_on_every_machine() -> None:
    q = Rotation("random", 3, seed=1).matrix()
    assert_close(
        q[0],
        torch.tensor([0.17342250392088898, -0.9190996960738611, -0.35380839985894186], dtype=torch.float64),
    )


@pytest.mark.parametrize("kind", ["random-hadamard", "random"])
def test_seeds_and_orders_are_independent(kind: str) -> None:
    n = 256
    q = [Rotation(kind, n, seed).matrix() for seed in (0, 1)]
    overlap = (q[0] * q[1]).sum() / n  # of independent matrices about 1/sqrt(n) at most
    assert overlap.abs() < 0.3
    corner = Rotation(kind, 2 * n).matrix()[:n, :n]
    assert ((corner * q[0]).sum() / (corner.norm() * q[0].norm())).abs() < 0.3


# -- modes -----------------------------------------------------------------------------------------


def fresh_caches(text: str) -> Rotation:
    """Return a rotation whose constants no earlier test has made."""
    return Rotation.parse(f"{text}-seed{torch.seed()}")


def test_constants_made_in_inference_mode_serve_autograd() -> None:
    rotation = fresh_caches("random-hadamard-20")
    with torch.inference_mode():
        rotation.apply(torch.ones(20))
    x = torch.ones(20, requires_grad=True)
    rotation.apply(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(20))


def test_constants_made_under_fake_tensors_are_real() -> None:
    for text in ("random-hadamard-20", "random-20"):
        rotation = fresh_caches(text)
        with FakeTensorMode():
            assert rotation.apply(torch.empty(3, 20)).shape == (3, 20)
            assert type(rotation.matrix()) is torch.Tensor
        x = randn(3, 20)
        assert_close(rotation.apply(x), x @ rotation.matrix())


def test_constants_ignore_the_default_device() -> None:
    with torch.device("meta"):
        matrix = fresh_caches("random-hadamard-20").matrix()
    assert matrix.device.type == "cpu"


def test_apply_can_be_traced_with_dynamic_shapes() -> None:
    rotation = Rotation("random-hadamard", 36, seed=4)
    graph = make_fx(lambda x: rotation.apply(x), tracing_mode="symbolic", pre_dispatch=True)(randn(4, 36))
    x = randn(7, 36)
    assert_close(graph(x), x @ rotation.matrix())


# -- given matrices --------------------------------------------------------------------------------


def test_a_given_matrix_is_known_by_its_content() -> None:
    q = Rotation("random", 12).matrix()
    rotation = Rotation.of_matrix(q)
    assert rotation == Rotation.parse(str(rotation)) == Rotation.of_matrix(q.clone())
    assert rotation.description() == "learned orthogonal 12"
    assert rotation.flops_per_element == 12
    assert torch.equal(rotation.matrix(), q)
    assert_close(rotation.apply(x := randn(3, 24)).reshape(3, 2, 12), x.reshape(3, 2, 12) @ q)
    assert_close(rotation.apply(rotation.apply(x), inverse=True), x)
    assert rotation != Rotation.of_matrix(-q)


def test_a_matrix_in_float32_becomes_exact() -> None:
    q = Rotation("random", 100).matrix().float()
    exact = Rotation.of_matrix(q).matrix()
    assert_close(exact @ exact.T, torch.eye(100, dtype=torch.float64))
    assert_close(exact, q.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 2), "differs from the identity by 2.0e\\+00, and may by 1e-06"),
        (torch.eye(3) * (1 + 1e-5), "differs from the identity by 2.0e-05"),
        (torch.full((2, 2), torch.nan), "differs from the identity by nan"),
        (torch.eye(3)[:2], r"its shape is \[2, 3\], not that of a square"),
        (torch.eye(0), r"its shape is \[0, 0\], not that of a square"),
    ],
)
def test_a_matrix_that_is_no_rotation(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(NotOrthogonalError, match=message + ".*Give an orthogonal matrix"):
        Rotation.of_matrix(matrix)


def test_a_matrix_of_another_process_is_not_known() -> None:
    rotation = Rotation.parse("learned-4-0123456789abcdef")
    with pytest.raises(UnknownMatrixError, match="learned-4-0123456789abcdef is not known in this process"):
        rotation.apply(randn(4))
    for kind, digest in (("learned", ""), ("hadamard", "0123456789abcdef")):
        with pytest.raises(OptionError, match="see of_matrix"):
            Rotation(kind, 4, digest=digest)
