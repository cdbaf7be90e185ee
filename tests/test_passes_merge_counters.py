import pytest
import torch
from graphs import Lambda, captured, linear, targets

from quarot_fx.passes.merge_counters import MergeCounters


def merged(function, *counters):
    """Merge, and check that results and counters are the same."""
    before, ours, theirs = ([torch.arange(4.0), *map(torch.tensor, counters)] for _ in range(3))
    program = captured(Lambda(function, a=linear(4, 4)), *before)
    before[1:] = map(torch.tensor, counters)  # to capture is to run
    result = MergeCounters()(program)
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*ours), program.graph_module(*theirs))
    torch.testing.assert_close(ours, theirs)
    assert not any(torch.equal(counter, old) for counter, old in zip(ours[1:], before[1:], strict=True))
    return result, result.reports[-1]


def advance(*steps):
    """Read each counter, and advance it."""

    def run(m, x, *counters):
        for counter, step in zip(counters, steps, strict=True):
            x = x + counter
            counter.add_(step)
        return (m.a(x),)

    return run


def test_counters_advance_together():
    result, report = merged(advance(1, 1, 1), 5, 6, 7)
    assert report.matched == 3
    assert targets(result).count("_foreach_add") == 1


def test_only_those_of_one_step():
    result, report = merged(advance(1, 2, 1, 3), 5, 6, 7, 8)
    assert report.matched == 2
    assert targets(result).count("_foreach_add") == 1


def test_one_alone_is_left():
    result, report = merged(advance(1), 5)
    assert report.matched == 0
    assert "_foreach_add" not in targets(result)


def test_a_count_that_is_read_afterwards_is_left():
    def run(m, x, a, b, c):
        y = m.a(x)
        for counter in (a, b, c):
            counter.add_(1)
        return (y + b,)

    _, report = merged(run, 5, 6, 7)
    assert report.matched == 2


@pytest.mark.parametrize("counters", [(1.5, 2.5), ([1, 2], [3, 4])])
def test_what_is_no_integer_is_left(counters):
    def run(m, x, a, b):
        y = m.a(x)
        a.add_(1)
        b.add_(1)
        return (y,)

    _, report = merged(run, *counters)
    assert report.matched == 0
