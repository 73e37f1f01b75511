"""What is learned of how long runs take."""

from __future__ import annotations

import math

from aoti_sched.queue.estimate import KNOWN_AFTER, WINDOW, ServiceTime, ServiceTimes


def learned(*seconds):
    time = ServiceTime()
    for one in seconds:
        time.learn(one)
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
        times.learn(100, 1.0)
        times.learn(5000, 50.0)
    assert times.bound(64) == times.bound(127) == 1.0
    assert times.bound(4096) == times.bound(8191) == 50.0
    assert times.bound(128) == times.bound(0) == math.inf


def test_what_is_forgotten_is_learned_anew():
    times = ServiceTimes()
    for _ in range(KNOWN_AFTER):
        times.learn(100, 1.0)
    times.forget(100)
    times.forget(100)
    assert times.bound(100) == math.inf
