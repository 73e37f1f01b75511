"""Service times: what is measured, and the rules for all else."""

import pytest

from aoti_sched.simulation.service_times import (
    EXTRAPOLATED,
    INTERPOLATED,
    MEASURED,
    RECORDED,
    ServiceTimes,
)


def run_of(size, leader=0):
    return [leader, *range(100, 99 + size)]


def test_a_recorded_run_takes_its_own_time():
    times = ServiceTimes({2: [1.0, 3.0]}, {(7, 2): 3.0})
    assert times.seconds(run_of(2, leader=7)) == 3.0
    assert times.sources == {RECORDED: 1}


def test_measured_times_of_a_size_are_taken_in_turn():
    times = ServiceTimes({1: [1.0, 2.0, 4.0]})
    assert [times.seconds(run_of(1)) for _ in range(4)] == [1.0, 2.0, 4.0, 1.0]
    assert times.sources == {MEASURED: 4}


@pytest.mark.parametrize(
    ("by_size", "size", "seconds"),
    [
        ({2: 4.0, 6: 8.0}, 4, 6.0),  # between
        ({2: 4.0, 6: 8.0}, 10, 12.0),  # beyond: the line goes on
        ({2: 4.0, 6: 3.0}, 10, 3.0),  # beyond, and never less than the largest
        ({2: 4.0, 6: 8.0}, 1, 3.0),  # below: the line goes on
        ({2: 4.0, 3: 8.0}, 1, 2.0),  # below, and never less for each request
        ({2: 4.0, 3: 3.0}, 1, 4.0),  # below, and never more
        ({4: 8.0}, 8, 16.0),  # a single size: in proportion
        ({4: 8.0}, 1, 8.0),  # a single size: a smaller run takes as long
        ({1: 1.0, 2: 2.0, 8: 5.0}, 5, 3.5),  # between the two nearest
    ],
)
def test_other_sizes_follow_the_rules(by_size, size, seconds):
    times = ServiceTimes({known: [value] for known, value in by_size.items()})
    assert times.typical(size) == seconds
    assert times.seconds(run_of(size)) == seconds
    inside = min(by_size) < size < max(by_size)
    assert times.sources == {INTERPOLATED if inside else EXTRAPOLATED: 1}


def test_the_spread_is_that_of_the_nearest_size():
    times = ServiceTimes({1: [1.0], 4: [2.0, 4.0, 6.0]})
    assert [times.seconds(run_of(3)) for _ in range(3)] == [1.5, 3.0, 4.5]


def test_sizes_without_a_time_are_not_known():
    assert ServiceTimes({4: [1.0], 2: [], 1: [1.0]}).sizes == [1, 4]
