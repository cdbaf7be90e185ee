"""How to test a pass: small graphs, FileCheck on the rewritten code, the counts of the report."""

import torch
from own_pass import MergeScales
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import FileCheck

X = torch.arange(4.0)


def trace(function) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True)(X)


def test_two_scales_become_one() -> None:
    def scale(x: Tensor) -> Tensor:
        return x * 2.0 * 0.25 + 1

    program = MergeScales()(trace(scale))
    FileCheck().check_count("aten.mul.Tensor", 1, exactly=True).check("0.5").check("aten.add").run(
        program.graph_module.code
    )
    assert program.reports[-1].matched == 1
    torch.testing.assert_close(program.graph_module(X), scale(X))


def test_product_that_is_read_elsewhere_stays() -> None:
    def scale(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2.0
        return y * 0.25, y

    report = MergeScales()(trace(scale)).reports[-1]
    assert report.matched == 0
    assert [decline.reason for decline in report.declined] == ["mul is read elsewhere, too"]


def test_product_of_tensors_is_not_looked_at() -> None:
    report = MergeScales()(trace(lambda x: x * x * 2.0)).reports[-1]
    assert (report.matched, report.declined) == (0, [])
