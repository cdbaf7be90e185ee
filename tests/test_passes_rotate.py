import pytest
import torch
from graphs import (
    WIDTH,
    Decoder,
    Lambda,
    apply,
    captured,
    check_code,
    difference,
    ids,
    linear,
    rewritten,
    targets,
    tokens,
)

from quarot_fx.config import QuarotConfig
from quarot_fx.errors import PipelineError
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.recognize_norms import RecognizeNorms
from quarot_fx.passes.rotate import Rotate


def placed(module, *inputs, **options):
    place = PlaceRotations(QuarotConfig(**options))
    return rewritten(captured(module, *inputs), RecognizeNorms(), FoldGains(), place)


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_every_transform_of_the_plan_becomes_a_node(rotation):
    program = placed(Decoder(), ids(), rotation=rotation)
    result, report = apply(Rotate(), program, ids())
    online = program.plan.online
    assert (report.matched, report.declined) == (len(online), [])
    assert report.weights == len({t.node for t in program.plan.transforms if not t.online})
    check_code(result).check("silu").check("rotate.default(mul").check_same("'hadamard-12'").run()


def test_without_a_plan():
    with pytest.raises(PipelineError, match="rotate needs a plan: run place-rotations before it"):
        Rotate()(captured(Decoder(), ids()))


def test_empty_plan_changes_nothing():
    program = placed(Decoder(), ids(), rotation="none")
    result, report = apply(Rotate(), program, ids())
    assert (report.matched, report.weights) == (0, 0)
    assert targets(result) == targets(program)


def test_readers_share_a_transform():
    """Phi's parallel block: one transform, both linear layers."""
    module = Lambda(lambda m, x: m.a(y := torch.relu(x)) + m.b(y), a=linear(4), b=linear(4))
    result, report = apply(Rotate(), placed(module, tokens()), tokens())
    assert report.matched == 1
    activations = [n for n in result.graph.nodes if "rotate" in str(n.target) and "relu" in str(n.args[0])]
    assert len(activations) == 1
    assert len(activations[0].users) == 2


def test_heads_are_rotated_in_two_steps():
    """``o_proj`` reads heads x head_dim: head_dim is in V's basis, heads are rotated online."""
    program = placed(Decoder(), ids())
    result, _ = apply(Rotate(), program, ids())
    (across,) = [t for t in program.plan.online if t.rotation == "hadamard-2"]
    assert across.inner in (1, WIDTH // 2)
    check_code(result).check("scaled_dot_product_attention").check("'hadamard-2'").run()


def test_another_seed_is_another_equal_program():
    one, other = (rewritten(placed(Decoder(), ids(), seed=seed), Rotate()) for seed in (0, 1))
    assert one.graph_module.code != other.graph_module.code
    assert difference(one, other, ids()) < 1e-9


def test_plan_from_json_does_the_same():
    from quarot_fx.basis.plan import RotationPlan

    program = placed(Decoder(), ids())
    expected = Rotate()(program).graph_module.code
    program.plan = RotationPlan.from_dict(program.plan.as_dict())
    assert Rotate()(program).graph_module.code == expected
