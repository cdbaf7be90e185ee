import pytest
import torch
from graphs import Decoder, Lambda, apply, captured, check_code, ids, linear, reasons, targets
from torch import nn

from quarot_fx.config import QuarotConfig
from quarot_fx.passes.quantize_embeddings import QuantizeEmbeddings


def test_embedding_is_left_alone_unless_it_is_named():
    program = captured(Decoder(), ids())
    result, report = apply(QuantizeEmbeddings(), program, ids())
    assert (report.matched, reasons(report)) == (0, ["it is an embedding; name it in overrides to quantise it"])
    assert report.declined[0].where == "embedding.weight"
    assert targets(result) == targets(program)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 4])
def test_named_embedding_is_packed_and_more_bits_are_closer(symmetric, group):
    program = captured(Lambda(lambda m, ids: m.a(m.table(ids)), table=nn.Embedding(9, 16), a=linear(4)), ids())
    (expected,) = program.graph_module(ids())

    def error(bits):
        override = {"w_bits": bits, "w_sym": symmetric, "w_group": group}
        result, report = apply(QuantizeEmbeddings(QuarotConfig(overrides={"table": override})), program, ids())
        assert (report.matched, report.weights, report.declined) == (1, 1, [])
        check_code(result).check("aten.embedding").check("quarot.unpack").check("quarot.dequantize").run()
        return float(((result.graph_module(ids())[0] - expected).norm() / expected.norm()).detach())

    errors = [error(bits) for bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_named_to_be_skipped():
    config = QuarotConfig(overrides={"embedding": "skip"})
    _, report = apply(QuantizeEmbeddings(config), captured(Decoder(), ids()), ids())
    assert reasons(report) == ["w_bits=16 asks to leave it alone"]


def test_table_that_is_an_input_is_not_looked_at():
    module = Lambda(lambda m, ids, table: m.a(torch.nn.functional.embedding(ids, table)), a=linear(4))
    inputs = ids(), torch.randn(9, 16)
    _, report = apply(QuantizeEmbeddings(), captured(module, *inputs), *inputs)
    assert (report.matched, report.declined) == (0, [])
