import pytest
import torch
from graphs import WIDTH, Lambda, apply, captured, check_code, linear, reasons, targets, tokens

from quarot_fx.passes.split_packed_linears import SplitPackedLinears

HEADS, SIZE = 2, 4
PACKED = 3 * HEADS * SIZE


def by_slices(y):
    return y[..., :8], y[..., 8:16], y[..., 16:]


def by_selection(y):
    return y[:, :, 0], y[:, :, 1], y[:, :, 2]


def gpt_neox(y):
    """``[batch, tokens, heads, 3 * size]``, chunked along the last axis."""
    return y.view(2, 3, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)


def falcon(y):
    """All queries of a group, one key and one value: selected by position."""
    y = y.view(2, 3, HEADS, 3, SIZE)
    return y[:, :, :, 0], y[..., 1, :], y[:, :, :, -1, :]


LAYOUTS = {
    "slice": by_slices,
    "uneven slices, as with fewer keys than queries": lambda y: (y[..., :16], y[..., 16:20], y[..., 20:]),
    "chunk": lambda y: y.chunk(3, dim=-1),
    "chunk, positive axis": lambda y: y.chunk(3, 2),
    "split": lambda y: y.split(8, dim=-1),
    "split with sizes": lambda y: y.split([16, 4, 4], dim=-1),
    "unbind": lambda y: y.view(2, 3, 3, HEADS, SIZE).unbind(2),
    "view(3, heads, size) and select": lambda y: by_selection(y.view(2, 3, 3, HEADS, SIZE)),
    "view(heads, 3, size) and select": falcon,
    "view(heads, 3 * size) and chunk": gpt_neox,
    "view, permute and unbind": lambda y: y.reshape(2, 3, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0),
    "another axis in front": lambda y: y.unsqueeze(1).split([16, 4, 4], dim=3),
    "batch axes moved": lambda y: y.transpose(0, 1).chunk(3, dim=-1),
    "batch axes merged as the last one is split": lambda y: y.view(6, 2, 12).transpose(0, 1).split(4, -1),
    "a part unused": lambda y: by_slices(y)[:2],
}


def outputs(parts):
    return tuple(part.contiguous() * 2 for part in parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_in_every_layout(layout, bias):
    module = Lambda(lambda m, x: outputs(LAYOUTS[layout](m.packed(x))), packed=linear(PACKED, bias=bias))
    program = captured(module, tokens())
    result, report = apply(SplitPackedLinears(), program, tokens())
    parts = 2 if layout == "a part unused" else 3
    assert (report.matched, report.weights, report.declined) == (1, parts, [])
    assert targets(result).count("linear") == parts
    assert not {"chunk", "split", "split_with_sizes", "unbind", "slice", "select"} & set(targets(result))
    for actual, expected in zip(result.graph_module(tokens()), program.graph_module(tokens()), strict=True):
        assert actual.shape == expected.shape
    check_code(result).check_count("aten.linear", parts, exactly=True).run()


@pytest.mark.parametrize("layout", ["slice", "chunk", "split", "unbind", "view(heads, 3 * size) and chunk"])
def test_conv1d_with_views_around_it(layout):
    """GPT-2's Conv1D: the batch axes are merged before the product and restored after it."""

    def forward(m, x):
        y = torch.addmm(m.bias, x.view(-1, WIDTH), m.weight).view(2, 3, PACKED)
        return outputs(LAYOUTS[layout](y))

    program = captured(Lambda(forward, weight=(WIDTH, PACKED), bias=PACKED), tokens())
    result, report = apply(SplitPackedLinears(), program, tokens())
    assert (report.matched, report.weights) == (1, 3)
    assert targets(result).count("addmm") == 3


def test_gate_and_up():
    def forward(m, x):
        gate, up = m.packed(x).chunk(2, dim=-1)
        return m.down(torch.nn.functional.silu(gate) * up)

    program = captured(Lambda(forward, packed=linear(24), down=linear(WIDTH, 12)), tokens())
    result, report = apply(SplitPackedLinears(), program, tokens())
    assert (report.matched, report.weights) == (1, 2)
    assert targets(result).count("linear") == 3


def test_gate_and_up_interleaved():
    program = captured(Lambda(lambda m, x: (y := m.packed(x))[..., ::2] * y[..., 1::2], packed=linear(24)), tokens())
    _, report = apply(SplitPackedLinears(), program, tokens())
    assert (report.matched, report.weights) == (1, 2)


def test_empty_part_is_declined():
    program = captured(
        Lambda(lambda m, x: (y := m.packed(x))[..., :8] * 2 + y[..., 30:].sum(), packed=linear(24)), tokens()
    )
    result, report = apply(SplitPackedLinears(), program, tokens())
    assert (report.matched, reasons(report)) == (0, ["a part of a packed layer is empty"])
    assert targets(result) == targets(program)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.packed(x) * 2,  # never split
        lambda m, x: (y := m.packed(x))[..., :8] * y.sum(),  # also read as a whole
        lambda m, x: m.packed(x)[:, :1] * 2,  # taken along tokens
        lambda m, x: m.packed(x)[..., :24] * 2,  # taken as a whole
        lambda m, x: torch.relu(m.packed(x)).chunk(3, -1)[0] * 2,
        lambda m, x: m.packed(x).view(2, 3 * PACKED)[:, :5] * 2,  # tokens and channels in one axis
    ],
)
def test_what_is_not_packed_stays(forward):
    program = captured(Lambda(forward, packed=linear(PACKED)), tokens())
    result, report = apply(SplitPackedLinears(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)
