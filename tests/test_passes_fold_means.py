import pytest
import torch
from graphs import WIDTH, Lambda, apply, captured, check_code, linear, reasons, rewritten, targets, tokens
from torch import nn

from quarot_fx.passes.fold_biases import FoldBiases
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.fold_means import FoldMeans
from quarot_fx.passes.recognize_norms import RecognizeNorms

IDS = torch.arange(5)[None]


class Model(nn.Module):
    """Embeddings, one residual block, LayerNorms without gains; what else reads the stream is a parameter."""

    def __init__(self, stream=lambda m, h: h, bias=True):
        super().__init__()
        self.stream = stream
        self.embedding, self.positions = nn.Embedding(8, WIDTH), nn.Embedding(8, WIDTH)
        self.norm, self.last = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.up, self.down = linear(12, bias=bias), linear(WIDTH, 12, bias=bias)
        self.head, self.vector = linear(8), nn.Parameter(torch.empty(WIDTH))

    def forward(self, ids):
        h = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return self.head(self.last(self.stream(self, h)))


def prepared(module, *inputs):
    return rewritten(captured(module, *inputs), RecognizeNorms(), FoldBiases(), FoldGains())


@pytest.mark.parametrize("bias", [False, True])
def test_means_move_into_all_writers(bias):
    result, report = apply(FoldMeans(), prepared(Model(bias=bias), IDS), IDS)
    assert (report.matched, report.declined) == (2, [])
    assert report.weights == (3 if bias else 2)  # token embedding, down and its bias; positions are a constant
    check_code(result).check_not("project_out").run()
    assert targets(result).count("sub") == (4 if bias else 3)


def test_learned_positions_by_index():
    class Indexed(Model):
        def forward(self, ids):
            h = self.embedding(ids) + self.positions(ids)
            return self.head(self.last(h))

    result, report = apply(FoldMeans(), prepared(Indexed(), IDS), IDS)
    assert (report.matched, report.weights, report.declined) == (1, 2, [])
    assert "project_out" not in targets(result)


def test_writers_are_found_through_scalings_casts_and_views():
    def stream(m, h):
        return (h * 0.5).double().reshape(-1, WIDTH).float()[1:]

    result, report = apply(FoldMeans(), prepared(Model(stream), IDS), IDS)
    assert report.declined == []
    assert "project_out" not in targets(result)


def test_addmm_writes_the_stream():
    class Conv1D(Model):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))

        def forward(self, ids):
            h = self.embedding(ids)
            y = torch.addmm(self.vector, self.norm(h).view(-1, WIDTH), self.weight).view(h.shape)
            return self.head(self.last(h + y))

    result, report = apply(FoldMeans(), prepared(Conv1D(), IDS), IDS)
    assert (report.matched, report.weights, report.declined) == (2, 3, [])
    assert "project_out" not in targets(result)


def test_subtracted_branch():
    def stream(m, h):
        return h - m.down(torch.relu(m.up(m.norm(h))))

    result, report = apply(FoldMeans(), prepared(Model(stream), IDS), IDS)
    assert (report.matched, report.declined) == (3, [])
    assert "project_out" not in targets(result)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (lambda m, h: h + m.head(h).sum(), "the stream is also read by aten.linear.default linear"),
        (lambda m, h: h + torch.relu(h), "the stream is also read by aten.relu.default relu"),
        (lambda m, h: h * m.vector, "the stream is also read by aten.mul.Tensor mul"),
        (lambda m, h: h + h.mean(), "the stream is also read by aten.mean.default mean"),
        (lambda m, h: h[..., :4].repeat(1, 1, 4), "the stream is also read by aten.slice.Tensor slice"),
    ],
)
def test_means_stay_where_something_else_sees_them(stream, reason):
    program = prepared(Model(stream), IDS)
    result, report = apply(FoldMeans(), program, IDS)
    found = reasons(report)
    assert any(
        one.startswith(f"a mean is removed online: {reason}") and one.endswith("which sees the mean") for one in found
    )
    assert "project_out" in targets(result)


def test_mean_of_an_input_stays():
    module = Lambda(lambda m, x: m.a(m.norm(x)), norm=nn.LayerNorm(WIDTH), a=linear(4))
    _, report = apply(FoldMeans(), prepared(module, tokens()), tokens())
    assert report.matched == 0
    assert reasons(report)[0].endswith("writes the stream and cannot be centred")


def test_stream_that_is_an_output():
    def both(m, x):
        h = m.write(x)
        return m.a(m.norm(h)), h

    module = Lambda(both, write=linear(WIDTH), norm=nn.LayerNorm(WIDTH), a=linear(4))
    _, report = apply(FoldMeans(), prepared(module, tokens()), tokens())
    assert reasons(report) == [
        "a mean is removed online: the stream is also read by the graph's output, which sees the mean"
    ]


def test_rows_taken_from_a_table_are_centred_in_it():
    module = Lambda(lambda m, x: m.a(m.norm(m.w(x) + m.table.index_select(0, torch.arange(3)) * x[..., :1])),
                    w=linear(WIDTH), table=(5, WIDTH), norm=nn.LayerNorm(WIDTH), a=linear(4))  # fmt: skip
    _, report = apply(FoldMeans(), prepared(module, tokens()), tokens())
    assert (report.matched, report.weights, report.declined) == (1, 2, [])


def test_constant_stream():
    module = Lambda(lambda m, x: m.a(m.norm(m.table.view(3, WIDTH)[None]) + x), table=3 * WIDTH,
                    norm=nn.LayerNorm(WIDTH), a=linear(4))  # fmt: skip
    _, report = apply(FoldMeans(), prepared(module, tokens()), tokens())
    assert (report.matched, report.weights) == (1, 1)


def test_rms_norm_has_no_mean():
    module = Lambda(lambda m, x: m.a(m.norm(m.write(x))), write=linear(WIDTH), norm=nn.RMSNorm(WIDTH), a=linear(4))
    _, report = apply(FoldMeans(), prepared(module, tokens()), tokens())
    assert (report.matched, report.declined) == (0, [])
