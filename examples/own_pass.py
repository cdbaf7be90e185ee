"""Use quarot's passes in a compiler stack of your own, with passes of your own between them.

    python examples/own_pass.py

Every pass takes an FX graph of ATen operators and returns a new program with a report. ``test_own_pass.py`` shows how
to test one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from quarot_fx import Pass, Program
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.pipeline import run_pipeline
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.recognize_norms import RecognizeNorms
from quarot_fx.passes.rotate import Rotate
from quarot_fx.report import PassReport

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeScales(Pass):
    """``(x * a) * b = x * (a b)`` for numbers a and b.

    This docstring is the pass's equation. Its name, ``merge-scales``, comes from the class.
    """

    def run(self, program: Program, report: PassReport) -> None:
        """Rewrite the program in place. Dead nodes are removed, and the graph is checked, after this returns."""
        for node in program.graph.nodes:
            source = node.args[0] if node.target is aten.mul.Tensor else None
            if not isinstance(source, fx.Node) or source.target is not aten.mul.Tensor:
                continue
            factors = [source.args[1], node.args[1]]
            if any(isinstance(factor, fx.Node) for factor in factors):
                continue  # not two numbers: none of our business
            if len(source.users) > 1:
                report.decline(node.name, f"{source.name} is read elsewhere, too")
                continue
            node.args = (source.args[0], factors[0] * factors[1])
            report.matched += 1


class Model(nn.Module):
    """A norm and two linear layers, with a nonlinearity and two scalings in a row between them."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, width] for [batch, width]."""
        return self.down(torch.relu(self.up(self.norm(x))) * 2.0 * 0.25)


def main() -> None:
    """Run one pass alone, then four with one of our own among them."""
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(4, 32)
    graph_module = torch.export.export(model, (x,)).module()

    print("One pass on a graph from torch.export, which stays as it is:\n")
    program = RecognizeNorms()(graph_module)
    program.graph_module.print_readable()
    print(program.reports[0])

    print("\nA pass of one's own between quarot's; each is checked in float64 on the given inputs:\n")
    passes = [RecognizeNorms(), FoldGains(), MergeScales(), PlaceRotations(), Rotate()]
    program = run_pipeline(Program.of(graph_module), passes, check_inputs=[x])
    for report in program.reports:
        print(f"{report.name:18} matched {report.matched}, output changed by {report.difference:.0e}")
    (y,) = program.graph_module(x)  # a rewritten graph returns its outputs as a tuple
    torch.testing.assert_close(y, model(x))


if __name__ == "__main__":
    main()
