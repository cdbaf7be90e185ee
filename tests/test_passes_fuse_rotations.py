import pytest
import torch
from graphs import (
    SPELLINGS,
    WHY_NOT_FUSED,
    WIDTH,
    Lambda,
    apply,
    check_same_but_for_flips,
    exported,
    linear,
    node_named,
    operand_of,
    reasons,
    targets,
    tokens,
)
from torch.nn import functional as F

from quarot_fx.config import QuarotConfig
from quarot_fx.ops.activations import ACTIVATIONS
from quarot_fx.passes.fuse_rotations import FuseRotations

FUSED, REFERENCE = "quarot.rotate_quantize.default", QuarotConfig(kernels="reference")
ROWS = (16, 3, WIDTH)


def rotate(x, *args):
    return torch.ops.quarot.rotate(x, *(args or (f"hadamard-{WIDTH}",)))


def fused(function, *inputs, dtype=torch.float32, **parts):
    """Fuse, and check that the result is the same but for codes at the border of two."""
    inputs = [x.to(dtype) for x in inputs or (tokens(*ROWS), tokens(*ROWS).roll(1))]
    program = exported(Lambda(function, **parts).to(dtype), *inputs)
    result, report = apply(FuseRotations(REFERENCE), program, *inputs)
    check_same_but_for_flips(result.graph_module(*inputs), program.graph_module(*inputs), dtype)
    return result, report


def arguments(program):
    """The first three arguments of the fused op, nodes by their names; inputs are args_0 and args_1."""
    return tuple(getattr(arg, "name", arg) for arg in node_named(program, FUSED).args[:3])


# -- activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"identity"}))
def test_gated(name, dtype):
    for forward in (
        lambda m, gate, x: operand_of(rotate(ACTIVATIONS[name](gate) * x)),
        lambda m, gate, x: operand_of(rotate(x * ACTIVATIONS[name](gate.float()).to(x.dtype))),
    ):
        result, report = fused(forward, dtype=dtype)
        assert (report.matched, targets(result)) == (1, ["rotate_quantize"])
        assert arguments(result) == ("args_1", "args_0", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_without_a_gate(name, dtype):
    result, report = fused(lambda m, x: operand_of(rotate(ACTIVATIONS[name](x))), tokens(*ROWS), dtype=dtype)
    assert (report.matched, targets(result)) == (1, ["rotate_quantize"])
    assert arguments(result) == ("args_0", None, name)


@pytest.mark.parametrize(("name", "function"), SPELLINGS)
def test_activations_in_every_spelling(name, function):
    result, _ = fused(lambda m, x: operand_of(rotate(function(x))), tokens(*ROWS))
    assert targets(result) == ["rotate_quantize"]
    assert arguments(result) == ("args_0", None, name)
    result, _ = fused(lambda m, gate, x: operand_of(rotate(x * function(gate))))
    assert targets(result) == ["rotate_quantize"]
    assert arguments(result) == ("args_1", "args_0", name)


OTHERS = {
    "with another constant": lambda x, y: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "capped": lambda x, y: F.silu(x).clamp(max=1e4),
    "leaky": lambda x, y: F.leaky_relu(x, 1e-3),
    "of a norm": lambda x, y: F.softmax(x, -1),
    "shifted": lambda x, y: F.silu(x) + 1,
    "a gate for each row": lambda x, y: torch.sigmoid(y[..., :1]) * x,
    "a longer expression": lambda x, y: (
        x.sin().cos().sin().cos().sin().cos().sin().cos().sin().cos().sin().cos().relu()
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_activation_of_the_op_is_computed_before(case):
    result, report = fused(lambda m, x, y: operand_of(rotate(OTHERS[case](x, y))))
    assert report.matched == 1
    _, gate, activation = arguments(result)
    assert (gate, activation) == (None, "relu" if case == "a longer expression" else "identity")


def test_a_gate_that_is_made_of_x():
    result, _ = fused(lambda m, x: operand_of(rotate(x * torch.sigmoid(1.702 * x))), tokens(*ROWS))
    assert targets(result) == ["mul", "rotate_quantize"]
    assert arguments(result) == ("args_0", "mul", "sigmoid")


def test_a_product_without_an_activation_is_computed_before():
    result, _ = fused(lambda m, x, y: operand_of(rotate(x * y)))
    assert targets(result) == ["mul", "rotate_quantize"]


def test_a_product_that_others_read_is_computed_once():
    result, report = fused(lambda m, gate, x: (*operand_of(rotate(y := F.silu(gate) * x)), y))
    assert report.matched == 1
    assert targets(result) == ["silu", "mul", "rotate_quantize"]
    assert arguments(result) == ("mul", None, "identity")


def test_one_rotation_for_two_schemes():
    result, report = fused(lambda m, gate, x: (*operand_of(y := rotate(F.silu(gate) * x)), *operand_of(y, 8)))
    assert report.matched == 2
    assert targets(result) == ["rotate_quantize", "rotate_quantize"]


# -- rotations and views ---------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", [("hadamard-4", -1, 4), ("hadamard-2", 2, 8), ("hadamard-8", 2, 1)])
@pytest.mark.parametrize("scheme", [(4, None, True), (8, None, False), (4, 4, False)])
def test_heads_blocks_and_schemes(rotation, scheme):
    result, report = fused(lambda m, x: operand_of(rotate(x, *rotation), *scheme), tokens(*ROWS))
    assert (report.matched, targets(result)) == (1, ["rotate_quantize"])


@pytest.mark.parametrize("scheme", [(4, None, True), (4, 4, False)])
def test_rows_may_be_arranged_anywhere(scheme):
    def forward(m, gate, x):
        return operand_of(rotate((F.silu(gate) * x).view(-1, WIDTH)).reshape(16, -1, WIDTH), *scheme)

    result, report = fused(forward)
    assert report.matched == 1
    assert targets(result)[0] == "rotate_quantize"
    assert arguments(result) == ("args_1", "args_0", "silu")


def test_heads_that_are_joined():
    result, report = fused(
        lambda m, x: operand_of(rotate(x.transpose(0, 1).flatten(1), "hadamard-16", -1, WIDTH)), tokens(*ROWS)
    )
    assert report.matched == 1
    assert targets(result) == ["transpose", "flatten", "rotate_quantize"]


DECLINED = {
    "a rotation is undone, and the kernel only rotates": lambda x, y: rotate(x, "hadamard-16", -1, 1, True),
    "axis 0 of 3 is rotated, and codes share a scale along the last one": lambda x, y: rotate(x, "hadamard-16", 0),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_rotations_that_the_op_does_not_do(reason):
    result, report = fused(lambda m, x, y: operand_of(DECLINED[reason](x, y)))
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "rotate_quantize" not in targets(result)


def test_a_rotated_tensor_that_others_read_is_not_rotated_twice():
    _, report = fused(lambda m, x, y: (*operand_of(z := rotate(x)), z.view(-1, WIDTH) + 1))
    assert report.matched == 0
    assert reasons(report) == ["it is also read by aten.add.Tensor add, and has to be computed for it anyway"]


def test_what_is_not_rotated():
    result, report = fused(lambda m, gate, x: operand_of(F.silu(gate) * x))
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == ["silu", "mul", "quantize_activation"]


# -- options and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    program = exported(Lambda(lambda m, x: operand_of(rotate(F.silu(m.a(x)))), a=linear(WIDTH)), tokens())
    result, report = apply(FuseRotations(QuarotConfig(kernels=kernels)), program, tokens())
    assert (report.matched, reasons(report)) == (0, [reason])
    assert targets(result) == targets(program)


def test_dynamic_sizes():
    def forward(m, x):
        gate, up = m.a(x).chunk(2, -1)
        return operand_of(rotate((F.silu(gate) * up).reshape(-1, WIDTH)))

    program = exported(Lambda(forward, a=linear(2 * WIDTH)), tokens(), dynamic=(0, 1))
    result, report = apply(FuseRotations(REFERENCE), program, tokens())
    assert (report.matched, "mul" in targets(result)) == (1, False)
    for shape in ((2, 3, WIDTH), (1, 7, WIDTH)):
        x = tokens(*shape)
        check_same_but_for_flips(result.graph_module(x), program.graph_module(x))
