"""The garbage collector rests while graphs are made, and is as the user left it afterwards."""

import gc

import pytest

from quarot_fx.garbage import NEW_OBJECTS, collected_rarely


@pytest.mark.parametrize(("before", "inside"), [(700, NEW_OBJECTS), (0, 0), (10**6, 10**6)])
def test_the_threshold_is_raised_only_where_the_collector_is_on_and_lower(before, inside):
    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(before, *thresholds[1:])
        with collected_rarely():
            assert gc.get_threshold() == (inside, *thresholds[1:])
        assert gc.get_threshold() == (before, *thresholds[1:])
    finally:
        gc.set_threshold(*thresholds)
