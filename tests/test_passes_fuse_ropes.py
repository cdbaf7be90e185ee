import pytest
import torch
from graphs import WHY_NOT_FUSED, Lambda, apply, exported, linear, node_named, reasons, targets, tokens
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.graph import FROZEN
from quarot_fx.ops.balance import random_balance
from quarot_fx.passes.fuse_ropes import FuseRopes

FUSED, REFERENCE = "quarot.rope_rotate.default", QuarotConfig(kernels="reference")
BATCH, HEADS, TOKENS, SIZE = 2, 3, 5, 8
BALANCE, ONE_BALANCE = (random_balance(heads, SIZE, torch.Generator().manual_seed(0)) for heads in (2, 1))
INPUTS = tokens(BATCH, TOKENS, HEADS, SIZE), tokens(1, TOKENS, SIZE).cos(), tokens(1, TOKENS, SIZE).sin()


def turned(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rope(x, cos, sin):
    return x * cos + turned(x) * sin


def rotate(x, *args):
    return torch.ops.quarot.rotate(x, *(args or (f"hadamard-{SIZE}",)))


def fused(function, *inputs, dtype=torch.float32):
    """Fuse, and check that the result is the same up to rounding; the function takes heads before tokens."""
    inputs = [x.to(dtype) for x in inputs or INPUTS]
    program = exported(Lambda(lambda m, x, cos, sin: function(x.transpose(1, 2), cos, sin)), *inputs)
    result, report = apply(FuseRopes(REFERENCE), program, *inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-5
    assert_close(result.graph_module(*inputs), program.graph_module(*inputs), rtol=tolerance, atol=tolerance)
    return result, report


SPELLINGS = {
    "as usual": lambda x, cos, sin: rope(x, cos.unsqueeze(1), sin.unsqueeze(1)),
    "operands in another order": lambda x, cos, sin: sin[:, None] * turned(x) + cos[:, None] * x,
    "angles with a head": lambda x, cos, sin: rope(x, cos.view(1, 1, TOKENS, SIZE), sin.view(1, 1, TOKENS, SIZE)),
    "angles without a batch": lambda x, cos, sin: rope(x, cos[0], sin[0]),
    "angles for each head": lambda x, cos, sin: rope(x, cos, sin),  # [1, tokens, size]: one head for all
    "angles in float32": lambda x, cos, sin: rope(x, cos[:, None].float(), sin[:, None].float()).to(x.dtype),
    "all in float32": lambda x, cos, sin: rope(x.float(), cos[:, None].float(), sin[:, None].float()).to(x.dtype),
    "joined to nothing": lambda x, cos, sin: torch.cat((rope(x, cos[:, None], sin[:, None]), x[..., SIZE:]), -1),
    "behind an empty cache": lambda x, cos, sin: torch.cat((x[:, :, :0], rope(x, cos[:, None], sin[:, None])), -2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling, dtype):
    result, report = fused(lambda *args: rotate(SPELLINGS[spelling](*args)), dtype=dtype)
    assert (report.matched, report.declined) == (1, [])
    assert "rotate" not in targets(result)
    assert not {"mul", "cat", "neg", "to"} & set(targets(result))
    x, *angles, rotation = node_named(result, FUSED).args
    assert (str(x.target), rotation) == ("aten.transpose.int", "hadamard-8")
    assert [angle.meta["val"].shape for angle in angles] == [(1, TOKENS, SIZE)] * 2


def test_angles_for_each_sequence():
    angles = tokens(BATCH, TOKENS, SIZE)
    _, report = fused(lambda *args: rotate(SPELLINGS["as usual"](*args)), INPUTS[0], angles.cos(), angles.sin())
    assert report.matched == 1


def test_keys_are_rotated_before_they_are_repeated():
    def forward(x, cos, sin):
        one_of_a_group = rope(x, cos[:, None], sin[:, None])[:, :, None]
        return rotate(one_of_a_group, "hadamard-4", 4).expand(-1, -1, 2, -1, -1)

    result, report = fused(forward)
    assert report.matched == 1
    assert targets(result) == ["transpose", "rope_rotate", "unsqueeze", "expand"]


@pytest.mark.parametrize("count", [1, TOKENS])
def test_heads_may_come_after_tokens(count):
    def forward(x, cos, sin):
        embedded = rope(x.transpose(1, 2), cos[:, :, None], sin[:, :, None])
        return rotate(embedded.transpose(1, 2))

    result, report = fused(forward, *(tensor[:, :count] for tensor in INPUTS))
    assert report.matched == 1
    assert "rotate" not in targets(result)
    x, *angles, _ = node_named(result, FUSED).args
    assert x.meta["val"].shape == (BATCH, HEADS, count, SIZE)
    assert [angle.meta["val"].shape for angle in angles] == [(1, count, SIZE)] * 2


@pytest.mark.parametrize("inverse", [(), (True,)])
@pytest.mark.parametrize("after", [False, True])
def test_heads_are_balanced_between(inverse, after):
    """Keys, and queries, of which two share a key; heads before tokens in the embedding, or after it."""

    def forward(x, cos, sin):
        if after:
            embedded = rope(x.transpose(1, 2), cos[:, :, None], sin[:, :, None]).transpose(1, 2)
        else:
            embedded = rope(x, cos[:, None], sin[:, None])
        return rotate(torch.ops.quarot.balance(embedded, BALANCE, *inverse), "hadamard-4")

    x = tokens(BATCH, TOKENS, 4 if inverse else 2, SIZE)
    result, report = fused(forward, x, *INPUTS[1:])
    assert (report.matched, report.declined) == (1, [])
    assert targets(result) in (["transpose", "rope_rotate"], ["transpose", "transpose", "transpose", "rope_rotate"])
    assert node_named(result, FUSED).args[3:] == ("hadamard-4", BALANCE, bool(inverse))


def test_other_readers_keep_the_embedding():
    result, report = fused(lambda x, cos, sin: (rotate(y := rope(x, cos[:, None], sin[:, None])), y))
    assert report.matched == 1
    assert {"rope_rotate", "mul", "cat"} < set(targets(result))


NO_ROPES = {
    "pairs of neighbours": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
    "turned the other way": lambda x: torch.cat((x[..., SIZE // 2 :], -x[..., : SIZE // 2]), -1),
    "not turned": lambda x: torch.cat((-x[..., : SIZE // 2], x[..., SIZE // 2 :]), -1),
    "unequal parts": lambda x: torch.cat((-x[..., 2:], x[..., :2]), -1),
    "of another": lambda x: turned(x + 1),
    "along tokens": lambda x: torch.cat((-x[:, :, 2:], x[:, :, :2]), 2),
}


@pytest.mark.parametrize("case", NO_ROPES)
def test_what_is_no_half_turn(case):
    def forward(x, cos, sin):
        return rotate(x * cos[:, None] + NO_ROPES[case](x) * sin[:, None])

    result, report = fused(forward)
    assert (report.matched, report.declined) == (0, [])
    assert "rotate" in targets(result)


def part(x, cos, sin):
    half = SIZE // 2
    embedded = rope(x[..., :half], cos[:, None, :, :half], sin[:, None, :, :half])
    return rotate(torch.cat((embedded, x[..., half:]), -1))


DECLINED = {
    "axes are moved in an unusual way between the embedding and the balance of heads": (
        lambda x, cos, sin: rotate(
            torch.ops.quarot.balance(rope(x, cos[:, None], sin[:, None]).flatten(1, 2)[:, None], ONE_BALANCE)
        )
    ),
    "only a part of each head is embedded, and all of it rotated": part,
    "what is embedded is appended to a cache before all of it is rotated": (
        lambda x, cos, sin: rotate(torch.cat((x, rope(x, cos[:, None], sin[:, None])), -2))
    ),
    "what is embedded has 3 axes, and the kernel takes batch, heads, tokens and size": (
        lambda x, cos, sin: rotate(rope(x[:, 0], cos, sin))
    ),
    "another axis than that of a head is rotated": (
        lambda x, cos, sin: rotate(rope(x, cos[:, None], sin[:, None]), "hadamard-4", -1, 2)
    ),
    "a rotation is undone, and the kernel only rotates": (
        lambda x, cos, sin: rotate(rope(x, cos[:, None], sin[:, None]), "hadamard-8", -1, 1, True)
    ),
    "what is embedded is torch.float32, and what is rotated torch.bfloat16": (
        lambda x, cos, sin: rotate(rope(x, cos[:, None], sin[:, None]).bfloat16()).float()
    ),
    "angles are not the same for all heads, and for every token their own: (2, 3, 5, 8) and (1, 3, 5, 8)": (
        lambda x, cos, sin: rotate(rope(x, cos[:, None].repeat(1, HEADS, 1, 1), sin[:, None].repeat(1, HEADS, 1, 1)))
    ),
    "angles are not the same for all heads, and for every token their own: (2, 3, 5, 8) and (1, 1, 1, 8)": (
        lambda x, cos, sin: rotate(rope(x, cos[:, None, :1], sin[:, None, :1]))
    ),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_the_op_does_not_take(reason):
    result, report = fused(DECLINED[reason])
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "rope_rotate" not in targets(result)


def test_without_a_rotation_after_it_it_is_left_alone():
    _, report = fused(lambda x, cos, sin: rope(x, cos[:, None], sin[:, None]))
    assert (report.matched, report.declined) == (0, [])


def test_a_tensor_that_is_mutated_is_read_where_it_was():
    program = exported(
        Lambda(lambda m, x, cos, sin: rotate(rope(x + 1, cos, sin))), tokens(2, 3, TOKENS, SIZE), *INPUTS[1:]
    )
    node_named(program, "aten.add.Tensor").meta[FROZEN] = "written in place"
    _, report = apply(FuseRopes(REFERENCE), program, tokens(2, 3, TOKENS, SIZE), *INPUTS[1:])
    assert report.matched == 0


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    program = exported(Lambda(lambda m, *args: rotate(rope(*args))), tokens(1, 2, TOKENS, SIZE), *INPUTS[1:])
    result, report = apply(FuseRopes(QuarotConfig(kernels=kernels)), program, tokens(1, 2, TOKENS, SIZE), *INPUTS[1:])
    assert (report.matched, reasons(report)) == (0, [reason])
    assert targets(result) == targets(program)


def test_dynamic_sizes():
    def forward(m, x, positions):
        x = m.a(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
        angles = positions[..., :1] * torch.arange(SIZE // 2).repeat(2)
        return rotate(rope(x, angles.cos()[:, None], angles.sin()[:, None]))

    program = exported(Lambda(forward, a=linear(HEADS * SIZE)), tokens(), tokens(), dynamic=(0, 1))
    result, report = apply(FuseRopes(REFERENCE), program, tokens(), tokens())
    assert report.matched == 1
    for shape in ((2, 3, 16), (1, 7, 16)):
        x = tokens(*shape)
        assert_close(result.graph_module(x, x), program.graph_module(x, x), rtol=1e-5, atol=1e-5)
