"""What is learned of how long runs take."""

from __future__ import annotations

import math

from aoti_sched.queue.selection.service_time import (
    KNOWN_AFTER,
    PATIENCE,
    WINDOW,
    ServiceTime,
    ServiceTimes,
)


def learned(*seconds):
    time = ServiceTime()
    for one in seconds:
        time.learn(1, one, 0.0)
    return time.bound


def test_too_little_is_known_at_first():
    assert learned(*[1.0] * (KNOWN_AFTER - 1)) == math.inf
    assert learned(*[1.0] * KNOWN_AFTER) == 1.0


def test_one_outlier_in_ten_is_none():
    assert learned(*[1.0] * 9, 100.0) == 1.0
    assert learned(*[1.0] * 8, 100.0, 100.0) == 100.0


def test_what_was_long_ago_is_forgotten():
    assert learned(*[100.0] * WINDOW, *[1.0] * (WINDOW - 4)) == 100.0
    assert learned(*[100.0] * WINDOW, *[1.0] * (WINDOW - 3)) == 1.0


def test_sizes_are_learned_apart_in_powers_of_two():
    times = ServiceTimes()
    for _ in range(KNOWN_AFTER):
        times.learn(100, 1.0, 0.0)
        times.learn(5000, 50.0, 0.0)
    assert times.bound(64) == times.bound(127) == 1.0
    assert times.bound(4096) == times.bound(8191) == 50.0
    assert times.bound(128) == times.bound(0) == math.inf


def test_what_is_forgotten_is_learned_anew():
    times = ServiceTimes()
    for _ in range(KNOWN_AFTER):
        times.learn(100, 1.0, 0.0)
    times.forget(100)
    times.forget(100)
    assert times.bound(100) == math.inf


def test_sums_are_made_of_the_mean_which_outliers_count_in():
    times = ServiceTimes()
    for seconds in [1.0] * 7 + [9.0]:
        times.learn(100, seconds, 0.0)
    assert (times.typical(100), times.mean(100)) == (1.0, 2.0)
    for _ in range(WINDOW):
        times.learn(100, 0.5, 0.0)
    assert times.mean(100) == 0.5
    assert (times.mean(1), times.knows(1), times.knows(100)) == (0.0, False, True)


def test_sums_of_means_are_exact():
    times = ServiceTimes()
    for seconds in (0.1, 0.2, 0.3, 0.7, 1e-5, 1 / 3, 0.1, 0.1, 0.1):
        times.learn(1, seconds, 0.0)
    mean = times.mean(1)
    total = sum([mean] * 1000)
    for _ in range(1000):
        total -= mean
    assert mean > 0
    assert total == 0


def test_what_is_believed_is_tried_when_no_run_was_seen_for_long():
    times = ServiceTimes()
    for _ in range(KNOWN_AFTER):
        times.learn(1, 0.5, 10.0)
    assert not times.should_probe(1, 13.9)
    assert times.should_probe(1, 14.0)  # eight times as long as a run
    assert not times.should_probe(1, 15.0)
    times.learn(1, 1e-6, 20.0)
    for _ in range(WINDOW):
        times.learn(1, 1e-6, 20.0)
    assert not times.should_probe(1, 20.0 + PATIENCE / 2)
    assert times.should_probe(1, 20.0 + PATIENCE)
