import gc

import torch
from graphs import WIDTH, Decoder, Lambda, apply, captured, ids, linear, rewritten, targets, tokens
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from quarot_fx.graph import stored_tensor
from quarot_fx.passes import fold_constants
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.store import WeightStore


def gain_and_linear(m, x):
    return m.a(x * m.g)


def weight_of(program):
    (node,) = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    return stored_tensor(node.args[1])


def test_rewritten_weight_is_computed_once():
    program = rewritten(captured(Lambda(gain_and_linear, g=WIDTH, a=linear(6)), tokens()), FoldGains())
    result, report = apply_rounding(program, tokens())
    assert (report.matched, report.weights, report.declined) == (1, 1, [])
    assert targets(result) == ["linear"]


def apply_rounding(program, *inputs):
    """The pass rounds, so its output is compared in the type that it rounds to."""
    before = program.graph_module(*inputs)
    result = FoldConstants()(program)
    assert_close(result.graph_module(*inputs), before, rtol=1e-2, atol=1e-2)
    return result, result.reports[-1]


def test_it_is_computed_in_float64_and_rounded_once():
    module = Lambda(gain_and_linear, g=WIDTH, a=linear(6)).bfloat16()
    program = rewritten(captured(module, tokens().bfloat16()), FoldGains())
    result, _ = apply_rounding(program, tokens().bfloat16())
    exact = module.a.weight.double() * module.g.double()
    assert torch.equal(weight_of(result), exact.bfloat16())


def test_the_users_parameters_stay():
    module = Lambda(gain_and_linear, g=WIDTH, a=linear(6))
    program = rewritten(captured(module, tokens()), FoldGains())
    kept = module.a.weight.clone()
    FoldConstants()(program)
    assert torch.equal(module.a.weight, kept)


def test_what_the_user_wrote_is_not_touched():
    """Constants of the model's own making cost the user nothing to leave, and memory to fold."""
    module = Lambda(lambda m, x: x @ (m.w * 2).mT, w=(6, WIDTH))
    program = captured(module, tokens())
    result, report = apply(FoldConstants(), program, tokens())
    assert (report.matched, targets(result)) == (0, targets(program))


def test_two_programs_share_a_constant_through_the_store():
    program = rewritten(captured(Lambda(gain_and_linear, g=WIDTH, a=linear(6)), tokens()), FoldGains())
    one, other = FoldConstants()(program), FoldConstants()(program)
    assert weight_of(one) is weight_of(other)
    program.store = WeightStore()
    assert weight_of(FoldConstants()(program)) is not weight_of(one)


def test_programs_remember_which_parameters_went_into_constants():
    module = Lambda(gain_and_linear, g=WIDTH, a=linear(6))
    program = rewritten(captured(module, tokens()), FoldGains())
    assert program.consumed == set()
    assert FoldConstants()(program).consumed == {id(module.a.weight), id(module.g)}
    assert program.consumed == set()


def test_packed_codes_stay_packed():
    program = rewritten(captured(Decoder(), ids()), QuantizeWeights())
    result, _ = apply(FoldConstants(), program, ids())
    assert targets(result).count("unpack") == targets(program).count("unpack") == 7


def test_what_a_constant_is_computed_from_is_freed_at_once(monkeypatch):
    """A model's worth of intermediate values, in float64, would not fit."""
    program = rewritten(captured(Decoder(), ids()), QuantizeWeights())
    made = {}
    compute = fold_constants.evaluate

    def observed(*arguments):
        with Remembering(made):
            return compute(*arguments)

    monkeypatch.setattr(fold_constants, "evaluate", observed)
    gc.disable()
    try:
        result = FoldConstants()(program)
        alive = [storage for storage in made if not storage.expired()]
    finally:
        gc.enable()
    held = (*result.graph_module.buffers(), *program.graph_module.parameters(), *program.graph_module.buffers())
    stored = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}
    assert len(made) > 2 * len(stored)
    assert all(storage in stored for storage in alive)


class Remembering(TorchDispatchMode):
    def __init__(self, made):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made[StorageWeakRef(result.untyped_storage())] = True
        return result
