import json

import pytest
from graphs import Decoder, captured, ids, rewritten
from hypothesis import given
from hypothesis import strategies as st

from quarot_fx.basis.plan import RotationPlan, Site, Transform
from quarot_fx.config import QuarotConfig
from quarot_fx.passes.fold_gains import FoldGains
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.recognize_norms import RecognizeNorms


@pytest.fixture(scope="module")
def plan():
    return planned()


def planned(**options):
    program = rewritten(
        captured(Decoder(), ids()), RecognizeNorms(), FoldGains(), PlaceRotations(QuarotConfig(**options))
    )
    assert program.plan is not None
    return program.plan


def test_round_trip_through_json(plan):
    assert RotationPlan.from_dict(json.loads(plan.to_json())) == plan
    assert RotationPlan.from_dict(plan.as_dict()) == plan


names, sizes = st.text("abc_.1", max_size=6), st.integers(0, 99)
transforms = st.builds(
    Transform, names, sizes, sizes, names, st.booleans(), st.lists(st.tuples(names, sizes)).map(tuple), st.booleans(),
    st.lists(sizes | names).map(tuple), names, names,
)  # fmt: skip
sites = st.builds(Site, names, names, names, names, names)
plans = st.builds(
    RotationPlan, st.lists(transforms).map(tuple), st.lists(sites).map(tuple),
    st.lists(st.tuples(names, sizes)).map(tuple), st.floats(0, 1e9),
)  # fmt: skip


@given(plans)
def test_any_plan_survives_the_round_trip(plan):
    assert RotationPlan.from_dict(json.loads(plan.to_json())) == plan


def test_planning_is_deterministic(plan):
    assert planned().to_json() == plan.to_json()


def test_a_seed_changes_absorbed_rotations_only(plan):
    other = planned(seed=1)
    assert other.online == plan.online
    assert other.sites == plan.sites
    assert {t.rotation for t in other.transforms} != {t.rotation for t in plan.transforms}


def test_every_transform_says_why_it_is_there(plan):
    for transform in plan.online:
        assert transform.where
        operator, _, reason = transform.why.partition(": ")
        assert operator
        assert reason


def test_every_site_that_is_not_free_says_why(plan):
    assert {site.rotated for site in plan.sites} == {"free", "online"}
    assert all(bool(site.why) == (site.rotated != "free") for site in plan.sites)


def test_cost_is_that_of_the_online_transforms(plan):
    from math import log2, prod

    def order(transform):
        return int(transform.rotation.split("-")[-1])

    expected = sum(prod(t.shape) * log2(order(t)) for t in plan.online)
    assert plan.cost == pytest.approx(expected, rel=1e-3)


def test_no_transform_is_on_the_residual_stream(plan):
    assert not any(transform.shape == (1, 5, 16) and transform.inner == 1 and "hadamard-16" in transform.rotation
                   for transform in plan.online)  # fmt: skip
    assert not any(transform.inverse for transform in plan.online)


def test_printed(plan):
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as captured_text:
        console.print(plan)
    text = captured_text.get()
    assert "block.down" in text
    assert "hadamard-12" in text
    assert f"{len(plan.transforms) - len(plan.online)} transforms are absorbed by weights" in text


def test_barriers_are_printed():
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as captured_text:
        console.print(RotationPlan(barriers=(("aten.foo.default", 3),)))
    assert "barrier: aten.foo.default has no rule (3 times)" in captured_text.get()
