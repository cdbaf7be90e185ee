"""Inputs for every operator that has a rule: calls in float64, by a tensor factory and the sizes of up to four axes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  registers an operator that has a rule
from torch import Tensor

from quarot_fx import ops  # noqa: F401  registers torch.ops.quarot
from quarot_fx.balance import Balance

aten, quarot = torch.ops.aten, torch.ops.quarot
INPUTS: dict[str, Callable[..., Iterator[Any]]] = {}


def calls(
    name: str, sizes: tuple[int, ...], generator: torch.Generator
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the arguments and keyword arguments of every call."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for call in INPUTS[name](new, *sizes):
        yield call if isinstance(call[0], tuple) else (call, {})


def operator(name: str) -> Any:
    """Return an operator by its full name."""
    library, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, library), packet), overload)


def inputs(*names: Any) -> Callable[..., Any]:
    """Enter a generator of calls for the named operators."""

    def enter(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        INPUTS.update(dict.fromkeys(map(str, names), function))
        return function

    return enter


@inputs(aten.linear.default)
def _(new, a, b, c, d):
    yield new(a, b, c), new(d, c)
    yield new(a, b, c), new(d, c), new(d)
    yield new(c), new(d, c), new(d)
    yield new(a, b, c), new(c)


@inputs(aten.matmul.default)
def _(new, a, b, c, d):
    yield new(a, b, c), new(c, d)
    yield new(a, b, c), new(a, c, d)
    yield new(b, c), new(a, c, d)
    yield new(1, a, b, c), new(d, a, c, b)
    yield new(b, c), new(c)
    yield new(a, b, c), new(c)
    yield new(c), new(a, c, d)
    yield new(c), new(c)


@inputs(aten.addmm.default)
def _(new, a, b, c, d):
    yield new(c), new(a, b), new(b, c)
    yield (new(a, c), new(a, b), new(b, c)), {"alpha": 2, "beta": 3}
    yield new(a, 1), new(a, b), new(b, c)


@inputs(aten.baddbmm.default)
def _(new, a, b, c, d):
    yield new(d), new(a, b, c), new(a, c, d)
    yield new(a, 1, d), new(a, b, c), new(a, c, d)
    yield new(a, b, 1), new(a, b, c), new(a, c, d)


@inputs(aten.conv1d.default)
def _(new, a, b, c, d):
    yield (new(a, b, c + 2), new(d, b, 3)), {}
    yield (new(a, b, c + 2), new(d, b, 3), new(d)), {"padding": [2]}
    yield (new(b, c + 2), new(d, b, 3)), {}
    yield (new(a, b, c + 2), new(b, 1, 3), new(b)), {"groups": b}
    yield (new(a, 2 * b, c + 2), new(2 * d, b, 3)), {"groups": 2}


@inputs(aten.linalg_solve_triangular.default)
def _(new, a, b, c, d):
    matrix = new(a, b, b) + 4 * torch.eye(b, dtype=torch.float64)
    yield (matrix, new(a, b, c)), {"upper": False}
    yield (matrix, new(a, c, b)), {"upper": True, "left": False}
    yield (matrix, new(1, b, c)), {"upper": False, "unitriangular": True}


@inputs(aten.scaled_dot_product_attention.default)
def _(new, a, b, c, d):
    yield new(a, b, c, 4), new(a, b, d, 4), new(a, b, d, 6)
    yield new(a, b, c, 4), new(a, b, d, 4), new(a, b, d, 6), new(a, 1, c, d)
    yield new(a, b, c, 4), new(a, b, d, 4), new(a, b, d, 4), torch.ones(c, d, dtype=torch.bool).tril()
    yield (new(a, 2 * b, c, 4), new(a, b, d, 4), new(a, b, d, 4)), {"enable_gqa": True, "scale": 0.3}
    yield (new(a, b, c, 4), new(a, b, c, 4), new(a, b, c, 4)), {"is_causal": True}


@inputs(aten.add.Tensor, aten.sub.Tensor)
def _(new, a, b, c, d):
    yield new(a, b, c), new(a, b, c)
    yield (new(a, b, c), new(c)), {"alpha": 2}
    yield new(a, 1, c), new(b, 1)
    yield new(a, b), 1.5
    yield new(a, b), torch.tensor(2.0, dtype=torch.float64)
    x = new(a, b)
    yield x, x


@inputs(aten.mul.Tensor, aten.multiply.Tensor, aten.div.Tensor, aten.true_divide.Tensor)
def _(new, a, b, c, d):
    yield new(a, b, c), new(a, b, c)
    yield new(a, b, c), new(c)
    yield new(a, b, c), new(a, b, 1)
    yield new(a, b, 1), new(a, b, c)
    yield new(a, 1, c), new(b, 1)
    yield new(a, b), 1.5
    yield new(a, b), torch.tensor(2.0, dtype=torch.float64)
    yield torch.tensor(2.0, dtype=torch.float64), new(a, b)


@inputs(aten.neg.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
        aten.lift_fresh_copy.default, aten.positive.default)  # fmt: skip
def _(new, a, b, c, d):
    yield (new(a, b, c),)


@inputs(aten.zeros.default, aten.ones.default, aten.empty.memory_format)
def _(new, a, b, c, d):
    yield ((a, b, c),), {"dtype": torch.float64}


@inputs(aten.full.default)
def _(new, a, b, c, d):
    yield ((a, b, c), 1.5), {"dtype": torch.float64}


@inputs(aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default)
def _(new, a, b, c, d):
    yield (new(a, b, c),)


@inputs(aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default)
def _(new, a, b, c, d):
    yield new(a, b, c), (d, c)


@inputs(aten.full_like.default)
def _(new, a, b, c, d):
    yield new(a, b, c), 1.5


@inputs(aten.new_full.default)
def _(new, a, b, c, d):
    yield new(a, b, c), (d, c), 1.5


@inputs(aten.to.dtype)
def _(new, a, b, c, d):
    yield new(a, b), torch.float64
    yield torch.ones(a, b, dtype=torch.int64), torch.float64
    yield new(a, b), torch.int64


@inputs(
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    aten.softplus.default, aten.log_sigmoid.default, aten.exp.default, aten.expm1.default, aten.log.default,
    aten.log1p.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.abs.default,
    aten.square.default, aten.cos.default, aten.sin.default, aten.floor.default, aten.leaky_relu.default,
    aten.elu.default, aten.hardtanh.default, aten.mish.default, aten.relu6.default, aten.round.default,
    aten.sign.default, aten.erf.default, aten.hardsigmoid.default, aten.hardswish.default, aten.triu.default,
    aten.tril.default, aten.celu.default, aten.selu.default, aten.sort.default, aten.argsort.default,
    aten.histc.default,
)  # fmt: skip
def _(new, a, b, c, d):
    yield (new(a, b),)


@inputs(aten.pow.Tensor_Tensor, aten.clamp.Tensor, aten.maximum.default, aten.minimum.default, aten.max.other,
        aten.min.other, aten.remainder.Tensor, aten.fmod.Tensor, aten.polar.default, aten.floor_divide.default,
        aten.atan2.default)  # fmt: skip
def _(new, a, b, c, d):
    yield new(a, b), new(a, b)
    yield new(a, b), new(b)


@inputs(aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
        aten.remainder.Scalar, aten.fmod.Scalar)  # fmt: skip
def _(new, a, b, c, d):
    yield new(a, b), 2


@inputs(aten.softmax.int, aten.log_softmax.int, aten.cumsum.default, aten.max.dim, aten.min.dim)
def _(new, a, b, c, d):
    yield new(a, b), -1


@inputs(aten.slice.Tensor)
def _(new, a, b, c, d):
    yield new(a, b, c), 1, 0, 1
    yield new(a, b, c), -1, 0, 2**63 - 1
    yield new(a, b, c), 0, 0, a, 2


@inputs(aten.narrow.default)
def _(new, a, b, c, d):
    yield new(a, b, c), 1, 0, 1
    yield new(a, b, c), 1, 0, b


@inputs(aten.split.Tensor)
def _(new, a, b, c, d):
    yield new(a, 2 * b, c), b, 1
    yield new(a, b, c), b, 1


@inputs(aten.chunk.default)
def _(new, a, b, c, d):
    yield new(a, 2 * b, c), 2, 1
    yield new(a, b, c), 1, 1


@inputs(aten.pad.default)
def _(new, a, b, c, d):
    yield new(a, b, c), [0, 0, 1, 0]
    yield new(a, b, c), [0, 0, 1, -1]  # a shift by one
    yield new(a, b, c), [0, 0, 1, 0], "constant", 1.0
    yield new(a, b + 1, c), [1, 1], "replicate"


@inputs(aten.constant_pad_nd.default)
def _(new, a, b, c, d):
    yield new(a, b, c), [0, 0, 1, 0]
    yield new(a, b, c), [0, 0, 1, -1]
    yield new(a, b, c), [0, 0, 1, 0], 1.0


@inputs(aten.select.int)
def _(new, a, b, c, d):
    yield new(a, b, c), 1, 0
    yield new(a, b, c), -1, 0


@inputs(aten.unbind.int)
def _(new, a, b, c, d):
    yield (new(a, b, c),)
    yield new(a, b, c), 1


@inputs(aten.where.self)
def _(new, a, b, c, d):
    yield new(a, b) > 0, new(a, b), new(a, b)
    yield new(a, 1) > 0, new(a, b), new(a, b)
    yield new(a, 1) > 0, new(a, b), new()


@inputs(aten.where.ScalarOther)
def _(new, a, b, c, d):
    for mask in new(a, b) > 0, new(a, 1) > 0, new(1, b) > 0:
        yield mask, new(a, b), 0.0
        yield mask, new(a, b), 0.5


@inputs(aten.masked_fill.Scalar)
def _(new, a, b, c, d):
    for mask in new(a, b) > 0, new(a, 1) > 0, new(b) > 0:
        yield new(a, b), mask, 0.0
        yield new(a, b), mask, 0.5


@inputs(aten.where.ScalarSelf)
def _(new, a, b, c, d):
    yield new(a, 1) > 0, 0, new(a, b)
    yield new(a, b) > 0, 0.5, new(a, b)


@inputs(aten.where.Scalar)
def _(new, a, b, c, d):
    yield new(a, b) > 0, 0.5, 1.5


@inputs(aten.masked_fill.Tensor)
def _(new, a, b, c, d):
    yield new(a, b), new(a, b) > 0, new()
    yield new(a, b), new(a, 1) > 0, new()


@inputs(aten.hstack.default)
def _(new, a, b, c, d):
    yield ([new(a, b, c), new(a, d, c)],)
    yield ([new(a), new(b)],)


@inputs(aten.copy_.default)
def _(new, a, b, c, d):
    yield new(a, b), new(a, b)
    yield new(a, b), new(b)


@inputs(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _(new, a, b, c, d):
    yield [new(a, b, d), new(a, c, d)], 1
    yield ([new(a, b), new(c, b)],)
    yield [new(0), new(a, b)], -1


@inputs(aten.stack.default)
def _(new, a, b, c, d):
    yield [new(a, b), new(a, b)], -1
    yield ([new(a, b), new(a, b)],)


@inputs(aten.index_select.default)
def _(new, a, b, c, d):
    yield new(a, b, c), 1, torch.arange(d) % b
    yield new(a, b, c), -1, torch.arange(c).flip(0)


@inputs(aten.index.Tensor)
def _(new, a, b, c, d):
    rows, columns = torch.arange(d) % b, torch.arange(d) % c
    yield new(a, b, c), [None, rows]
    yield new(a, b, c), [None, rows[:, None], columns]
    yield new(b, a, c), [rows, None, columns]
    yield new(a, b, c), [torch.arange(a) % 2 == 0]


@inputs(aten.index_put.default)
def _(new, a, b, c, d):
    rows = torch.arange(d) % b
    yield new(a, b, c), [None, rows], new(a, d, c), True
    yield new(a, b, c), [None, rows], new(1, d, 1), True
    yield new(a, b, c), [None, rows], new(c), True


@inputs(quarot.rotate.default)
def _(new, a, b, c, d):
    yield new(a, b, c), f"hadamard-{b}", 1
    yield new(a, b * c), f"random-{b}-seed1", 1, c, True


@inputs(quarot.balance.default)
def _(new, a, b, c, d):
    matrices = torch.eye(d, dtype=torch.float64) + torch.rand(b, 1, 1, dtype=torch.float64)
    yield new(a, b, c, d), str(Balance.of_matrices(matrices))
    yield new(a, b, c, d), str(Balance.of_matrices(matrices)), True


@inputs(aten.sum.dim_IntList, aten.mean.dim)
def _(new, a, b, c, d):
    yield new(a, b, c), [1]
    yield new(a, b, c), [-1], True
    yield new(a, b, c), [0, 2], True
    yield new(a, b), None


@inputs(aten.linalg_vector_norm.default)
def _(new, a, b, c, d):
    yield new(a, b, c), 2, [-1]
    yield new(a, b, c), 2, [1], True
    yield new(a, b, c), 1, [1]
    yield new(a, b, c), 2, [0, 1]


@inputs(aten.norm.ScalarOpt_dim)
def _(new, a, b, c, d):
    yield new(a, b, c), 2, [-1]
    yield new(a, b, c), 3, [1], True


@inputs(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _(new, a, b, c, d):
    yield new(a, b, c, d), [a, b, c * d]
    yield new(a, b * c, d), [a, b, c, d]
    yield new(a, b), [1, a, 1, b]
    yield new(2, 3, 6), [3, 2, 6]
    yield new(a, 0, b), [0, a, b]


@inputs(aten.unsqueeze.default)
def _(new, a, b, c, d):
    yield new(a, b), 1
    yield new(a, b), -1


@inputs(aten.squeeze.dim)
def _(new, a, b, c, d):
    yield new(a, 1, b), 1
    yield new(a, b, c), 1


@inputs(aten.flatten.using_ints)
def _(new, a, b, c, d):
    yield (new(a, b),)
    yield new(a, b, c), 1


@inputs(aten.movedim.int)
def _(new, a, b, c, d):
    yield new(a, b, c, d), 0, 2
    yield new(a, b, c, d), -1, 1


@inputs(aten.expand.default, aten.broadcast_to.default)
def _(new, a, b, c, d):
    yield new(a, 1, b), [a, c, b]
    yield new(a, b), [c, a, b]


@inputs(aten.repeat.default)
def _(new, a, b, c, d):
    yield new(a, b), [1, 1, 1]
    yield new(a, b), [2, 1, 3]


@inputs(aten.repeat_interleave.self_int)
def _(new, a, b, c, d):
    yield new(a, b, c), 2, 1
    yield new(a, b, c), 2


# Operators that one call is enough for.
ONE_CALL: dict[Any, Callable[..., Any]] = {
    aten.mm.default: lambda new, a, b, c, d: (new(a, b), new(b, c)),
    aten.bmm.default: lambda new, a, b, c, d: (new(a, b, c), new(a, c, d)),
    aten.mv.default: lambda new, a, b, c, d: (new(a, b), new(b)),
    "aten._grouped_mm.default": lambda new, a, b, c, d: (
        new(a + b, c),
        new(2, c, d),
        torch.tensor([a, a + b], dtype=torch.int32),
    ),
    "transformers.grouped_mm_fallback.default": lambda new, a, b, c, d: (
        new(a + b, c),
        new(2, c, d),
        torch.tensor([a, a + b], dtype=torch.int32),
    ),
    aten.add.Scalar: lambda new, a, b, c, d: (new(a, b), 1.5),
    aten.sub.Scalar: lambda new, a, b, c, d: (new(a, b), 1.5),
    aten.rsub.Scalar: lambda new, a, b, c, d: (new(a, b), 1.5),
    aten.mul.Scalar: lambda new, a, b, c, d: (new(a, b), 1.5),
    aten.div.Scalar: lambda new, a, b, c, d: (new(a, b), 1.5),
    aten.to.dtype_layout: lambda new, a, b, c, d: ((new(a, b),), {"dtype": torch.float64}),
    aten._to_copy.default: lambda new, a, b, c, d: ((new(a, b),), {"dtype": torch.float64}),
    aten.to.device: lambda new, a, b, c, d: (new(a, b), torch.device("cpu"), torch.float64),
    aten.to.other: lambda new, a, b, c, d: (new(a, b), new(c, d)),
    aten.type_as.default: lambda new, a, b, c, d: (new(a, b), new(c, d)),
    aten.pow.Scalar: lambda new, a, b, c, d: (2, new(a, b)),
    aten._softmax.default: lambda new, a, b, c, d: (new(a, b), -1, False),
    aten._safe_softmax.default: lambda new, a, b, c, d: (new(a, b), -1),
    aten.logsumexp.default: lambda new, a, b, c, d: (new(a, b), [-1]),
    aten.div.Tensor_mode: lambda new, a, b, c, d: ((new(a, b), new(a, b)), {"rounding_mode": "floor"}),
    aten.dropout.default: lambda new, a, b, c, d: (new(a, b), 0.5, False),
    aten.view_as_complex.default: lambda new, a, b, c, d: (new(a, b, 2),),
    aten.view_as_real.default: lambda new, a, b, c, d: (torch.view_as_complex(new(a, b, 2)),),
    aten.threshold.default: lambda new, a, b, c, d: (new(a, b), 0.1, 20.0),
    aten.split_with_sizes.default: lambda new, a, b, c, d: (new(a, b + c, d), [b, c], 1),
    aten.flip.default: lambda new, a, b, c, d: (new(a, b, c), [1]),
    aten.roll.default: lambda new, a, b, c, d: (new(a, b, c), [1], [1]),
    aten.slice_scatter.default: lambda new, a, b, c, d: (new(a, b + c, d), new(a, b, d), 1, 0, b),
    aten.topk.default: lambda new, a, b, c, d: (new(a, b), 1),
    aten.gather.default: lambda new, a, b, c, d: (new(a, b), 1, torch.zeros(a, b, dtype=torch.int64)),
    aten.scatter.value: lambda new, a, b, c, d: (new(a, b), 1, torch.zeros(a, 1, dtype=torch.int64), 0.5),
    aten.scatter.src: lambda new, a, b, c, d: (new(a, b), 1, torch.zeros(a, 1, dtype=torch.int64), new(a, 1)),
    aten.select_scatter.default: lambda new, a, b, c, d: (new(a, b, c), new(a, c), 1, 0),
    aten.embedding.default: lambda new, a, b, c, d: (new(a, b), torch.arange(c * d).reshape(c, d) % a),
    aten.index_copy.default: lambda new, a, b, c, d: (new(a, b + d, c), 1, torch.arange(d), new(a, d, c)),
    aten.index_add.default: lambda new, a, b, c, d: (new(a, b + d, c), 1, torch.arange(d), new(a, d, c)),
    quarot.quantize_asymmetric.default: lambda new, a, b, c, d: (new(a, b, c), 4),
    quarot.quantize_symmetric.default: lambda new, a, b, c, d: (new(a, b, c), 4),
    quarot.dequantize.default: lambda new, a, b, c, d: (
        torch.arange(a * b * c).reshape(a, b, c).char(),
        new(a, b, 1),
        None,
        torch.float64,
    ),
    quarot.mean_square.default: lambda new, a, b, c, d: (new(a, b, c),),
    quarot.expert_linear.default: lambda new, a, b, c, d: (new(a, c), new(b, d, c), torch.arange(a) % b),
    quarot.project_out.default: lambda new, a, b, c, d: (
        new(a, b, c),
        torch.nn.functional.normalize(new(c), dim=0),
    ),
    aten.view_as.default: lambda new, a, b, c, d: (new(a, b * c), new(a, b, c)),
    aten.reshape_as.default: lambda new, a, b, c, d: (new(a, b * c), new(a, b, c)),
    aten.squeeze.dims: lambda new, a, b, c, d: (new(a, 1, b, 1), [1, 3]),
    aten.squeeze.default: lambda new, a, b, c, d: (new(a, 1, b),),
    aten.unflatten.int: lambda new, a, b, c, d: (new(a, b * c), 1, [b, c]),
    aten.transpose.int: lambda new, a, b, c, d: (new(a, b, c), 1, -1),
    aten.swapaxes.default: lambda new, a, b, c, d: (new(a, b, c), 1, -1),
    aten.permute.default: lambda new, a, b, c, d: (new(a, b, c, d), [2, -1, 0, 1]),
    aten.t.default: lambda new, a, b, c, d: (new(a, b),),
    aten.numpy_T.default: lambda new, a, b, c, d: (new(a, b),),
    aten.mT.default: lambda new, a, b, c, d: (new(a, b),),
    aten.expand_as.default: lambda new, a, b, c, d: (new(a, 1, b), new(a, c, b)),
}
for target, call in ONE_CALL.items():
    inputs(target)(lambda *given, call=call: [call(*given)])
