"""Small modules and graphs that the tests of passes share, and what they ask of a pass."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import relu
from torch.testing import FileCheck

from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.inspection import capture_one_graph
from quarot_fx.ops import OpDeclaration
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.store import WeightStore

WIDTH = 16
WHY_NOT_FUSED = {  # on a CPU, by the option `kernels`
    "none": "kernels='none' asks to leave the graph as it is",
    "auto": "triton: Triton's kernels run on NVIDIA GPUs, not on cpu",
}


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values: a gain of 1 and a bias of 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tokens(*shape: int) -> Tensor:
    """Activations [2, 3, WIDTH], or of another shape."""
    return torch.randn(shape or (2, 3, WIDTH), generator=torch.Generator().manual_seed(1))


def captured(module: nn.Module, *inputs: Tensor) -> Program:
    """Capture a module, filled with random values, as the backend does."""
    graph, arguments = capture_one_graph(fill(module), inputs)
    return graph.bind(arguments, WeightStore())


def exported(module: nn.Module, *inputs: Tensor, dynamic: Sequence[int] = ()) -> Program:
    """Export a function, of parameters or of none, filled with random values; sizes of dynamic axes are symbols."""
    sizes = dict.fromkeys(dynamic, torch.export.Dim.AUTO)
    return Program.of(torch.export.export(fill(module), inputs, dynamic_shapes={"args": (sizes,) * len(inputs)}))


def apply(pass_: Pass, program: Program, *inputs: Tensor) -> tuple[Program, PassReport]:
    """Apply a pass; the given program stays as it is and the output too, where the pass says that it does."""
    before = program.graph_module.code
    tensors = {name: (t, t.clone()) for name, t in program.graph_module.state_dict(keep_vars=True).items()}
    result = pass_(program)
    assert program.graph_module.code == before
    assert all(torch.equal(tensor, copy) for tensor, copy in tensors.values())
    assert len(result.reports) == len(program.reports) + 1
    if pass_.tolerance is not None:
        assert difference(result, program, *inputs) < 1e-9
    for node in result.graph.nodes:
        assert node.op == "output" or "val" in node.meta, node
    return result, result.reports[-1]


def rewritten(program: Program, *passes: Pass) -> Program:
    """Apply passes in turn."""
    for one in passes:
        program = one(program)
    return program


def difference(program: Program, other: Program, *inputs: Tensor) -> float:
    """Return the relative difference of two programs' outputs in float64."""
    return relative_difference(
        run_in_float64(program.graph_module, *inputs), run_in_float64(other.graph_module, *inputs)
    )


def check_code(program: Program) -> FileCheck:
    """Return a FileCheck-like object for the program's code: ``check_code(p).check("linear").run()``."""
    return _Code(program.graph_module.code)


class _Code(FileCheck):
    def __init__(self, code: str) -> None:
        super().__init__()
        self._code = code

    def run(self) -> None:
        super().run(self._code)


def targets(program: Program) -> list[str]:
    """Return the operators of a program, in order, without namespaces and overloads."""
    return [
        str(node.target).split(".")[1] for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]


def reasons(report: PassReport) -> list[str]:
    """Return why a pass declined what it declined."""
    return [decline.reason for decline in report.declined]


def node_named(program: Program, operator: str, index: int = 0) -> fx.Node:
    """Return one call of an operator."""
    return [node for node in program.graph.nodes if str(node.target) == operator][index]


def outcome(declaration: OpDeclaration, function: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return what an op, or a function in its place, returns and what it writes; the arguments stay as they are."""
    args = [arg.clone() if place in declaration.written else arg for place, arg in enumerate(args)]
    returned = function(*args)
    returned = () if returned is None else (returned,) if isinstance(returned, Tensor) else tuple(returned)
    return *returned, *(args[place] for place in declaration.written)


# -- modules ---------------------------------------------------------------------------------------


class Lambda(nn.Module):
    """A forward function with parameters: ``Lambda(lambda m, x: x @ m.w, w=(8, 6))``."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.empty(part)))

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm as most models write it."""
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def linear(out: int, width: int = WIDTH, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, out, bias=bias)


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys [batch, heads, tokens, size]."""
    half = x.shape[-1] // 2
    positions, channels = (torch.arange(size, device=x.device) for size in (x.shape[-2], half))
    angles = positions[:, None] * 0.1 ** channels.repeat(2)
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * angles.cos() + turned * angles.sin()


class Block(nn.Module):
    """Attention with two heads and rotary positions and a gated MLP, each after an RMSNorm, on a residual stream."""

    def __init__(self, width: int = WIDTH, hidden: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.post_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        normed = self.post_norm(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """A decoder language model of one :class:`Block`; takes token ids."""

    def __init__(self, vocabulary: int = 16, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = Block(width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(ids))))


def ids(length: int = 5) -> Tensor:
    """Token ids [1, length] for :class:`Decoder`."""
    return torch.arange(length)[None]


# -- activations -----------------------------------------------------------------------------------

WRITTEN_OUT = {
    "silu": [lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))],
    "sigmoid": [lambda x: 1 / (1 + (-x).exp())],
    "relu": [lambda x: x.clamp(min=0), lambda x: (x + x.abs()) / 2],
    "relu_squared": [lambda x: relu(x) * relu(x), lambda x: relu(x).pow(2), lambda x: relu(x) * x],
    "gelu": [lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2)))],
    "gelu_tanh": [
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    ],
}
SPELLINGS = [
    pytest.param(name, function, id=f"{name}-{place}")
    for name, functions in WRITTEN_OUT.items()
    for place, function in enumerate(functions)
]


# -- integer codes ---------------------------------------------------------------------------------


def operand_of(x: Tensor, bits: int = 4, group: int | None = None, symmetric: bool = True) -> tuple[Tensor, ...]:
    """What an integer product reads of an activation: codes, scale, zero points if there are any, and sums of codes."""
    parts = torch.ops.quarot.quantize_activation(x, bits, group, 0.9, symmetric, torch.int8)
    return tuple(part for index, part in enumerate(parts) if index != 2 or not symmetric)


def check_same_but_for_flips(actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    """Compare results that are the same up to rounding to a type: then a few codes may be the neighbour's."""
    assert len(actual) == len(expected)
    tolerance, fraction = (1e-5, 0.02) if dtype == torch.float32 else (2.0**-6, 0.1)
    steps = max(1, fraction * max(t.numel() for t in expected if not t.is_floating_point()))
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        else:
            assert (one.int() - other.int()).abs().sum() <= steps
