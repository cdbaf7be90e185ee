import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, apply, captured, ids, linear, reasons, rewritten, targets, tokens
from torch import nn
from torch.nn import functional as F

from quarot_fx.config import QuarotConfig
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.recognize_norms import RecognizeNorms


def placed(module, *inputs, **options):
    program = rewritten(captured(module, *inputs), RecognizeNorms(), FoldGains())
    result, report = apply(PlaceRotations(QuarotConfig(**options)), program, *inputs)
    assert targets(result) == targets(program), "no node changes"
    return result.plan, report


def rotated(plan):
    return {f"{site.kind} {site.name}": site.rotated for site in plan.sites}


def test_decoder_is_rotated_as_the_paper_does_it():
    plan, report = placed(Decoder(), ids())
    found = rotated(plan)
    assert [name for name, kind in found.items() if kind == "online"] == [
        "linear block.output.weight", "linear block.down.weight", "key block",
    ]  # fmt: skip
    assert found["value block"] == "free"
    assert {name for name, kind in found.items() if kind == "free"} >= {
        f"linear block.{name}.weight" for name in ("query", "key", "value", "gate", "up")
    }
    assert found["linear head.weight"] == "free"
    assert len([t for t in plan.online if t.rotation == "hadamard-12"]) == 1
    assert (report.matched, report.declined) == (len(plan.sites), [])


def test_reasons_name_what_stands_in_the_way():
    plan, _ = placed(Decoder(), ids())
    (down,) = [site for site in plan.sites if site.name == "block.down.weight"]
    assert "aten.mul.Tensor" in down.why
    assert "multiplies element by element along this axis" in down.why
    (transform,) = [t for t in plan.online if t.rotation == "hadamard-12"]
    assert (transform.why, transform.where, transform.inverse, transform.shape) == (
        down.why, "block.down", False, (1, 5, 12),
    )  # fmt: skip


def test_rotation_none_places_nothing():
    plan, report = placed(Decoder(), ids(), rotation="none")
    assert (plan.transforms, plan.sites, plan.cost, report.matched) == ((), (), 0, 0)


def test_random_rotations_only_where_weights_absorb_them():
    plan, _ = placed(Decoder(), ids(), rotation="random", seed=7)
    assert {t.rotation for t in plan.transforms if t.online} <= {
        "hadamard-12",
        "hadamard-8",
        "hadamard-2",
        "hadamard-16",
    }
    assert f"random-{WIDTH}-seed7" in {t.rotation for t in plan.transforms if not t.online}


def test_the_seed_is_part_of_the_plan():
    plan, _ = placed(Decoder(), ids(), seed=3)
    assert f"random-hadamard-{WIDTH}-seed3" in {t.rotation for t in plan.transforms}


def test_planning_twice_gives_the_same_plan():
    assert placed(Decoder(), ids())[0] == placed(Decoder(), ids())[0]


def test_activations_left_alone_are_rotated_only_where_it_is_free():
    plan, report = placed(Decoder(), ids(), a_bits=16, kv_bits=16)
    assert plan.online == ()
    found = rotated(plan)
    assert found["linear block.down.weight"] == "no"
    assert found["linear block.query.weight"] == "free"
    assert any(reason.startswith("linear is not rotated: aten.mul.Tensor") for reason in reasons(report))


def test_caches_left_alone_are_not_looked_at():
    plan, _ = placed(Decoder(), ids(), k_bits=16)
    assert {site.kind for site in plan.sites} == {"linear", "value"}


def test_linear_that_is_skipped_asks_for_nothing():
    plan, _ = placed(Decoder(), ids(), overrides={"*.down": "skip"})
    (down,) = [site for site in plan.sites if site.name == "block.down.weight"]
    assert (down.rotated, "hadamard-12" in {t.rotation for t in plan.online}) == ("no", False)


def test_key_cache_that_is_written_out_is_found():
    def attention(m, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        weights = torch.softmax(q @ k.mT / 2.0, -1)
        return m.o((weights @ v).transpose(1, 2).flatten(2))

    module = Lambda(attention, **{name: linear(WIDTH) for name in "qkvo"})
    plan, _ = placed(module, tokens())
    assert [site.kind for site in plan.sites if site.kind != "linear"] == ["key", "value"]


def test_operator_without_a_rule_is_a_barrier_and_is_listed():
    module = Lambda(lambda m, x: m.b(torch.special.bessel_j0(m.a(x))) + m.b(torch.special.bessel_j0(x)),
                    a=linear(WIDTH), b=linear(12))  # fmt: skip
    plan, report = placed(module, tokens())
    assert plan.barriers == (("aten.special_bessel_j0.default", 2),)
    assert reasons(report) == ["operator aten.special_bessel_j0.default has no rule and is a barrier (2 times)"]


def test_sandwich_norm_costs_one_more_transform():
    """Its gain cannot be folded, so the stream is rotated after it, online."""

    def forward(m, ids):
        h = m.embedding(ids)
        h = h + m.norm(m.up(h))
        return m.head(torch.relu(m.down(h)))

    parts = {"embedding": nn.Embedding(8, WIDTH), "norm": nn.RMSNorm(WIDTH), "up": linear(WIDTH), "down": linear(12),
             "head": linear(8, 12)}  # fmt: skip
    plan, _ = placed(Lambda(forward, **parts), ids())
    (transform,) = [t for t in plan.online if t.rotation == f"hadamard-{WIDTH}"]
    assert "aten.mul.Tensor" in transform.why


def test_input_of_odd_size_takes_an_orthogonal_matrix_of_that_order():
    module = Lambda(lambda m, x: m.b(F.silu(m.a(x))), a=linear(15), b=linear(4, 15))
    plan, _ = placed(module, tokens())
    assert "hadamard-15" in {t.rotation for t in plan.online}


def test_axis_of_one_element_is_not_rotated():
    module = Lambda(lambda m, x: m.b(m.a(x)) + m.c(x), a=linear(1), b=linear(4, 1), c=linear(4))
    plan, report = placed(module, tokens())
    (site,) = [site for site in plan.sites if site.name == "b.weight"]
    assert (site.rotated, site.why) == ("no", "its size is not known, or is 1")
    assert "linear is not rotated: its size is not known, or is 1" in reasons(report)


@pytest.mark.parametrize("bits", [{"w_bits": 16, "a_bits": 16, "kv_bits": 16}, {}])
def test_quantising_nothing_is_planned_as_quantising_everything(bits):
    assert placed(Decoder(), ids(), **bits)[0] == placed(Decoder(), ids())[0]
