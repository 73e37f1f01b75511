"""Histograms as values: buckets, quantiles, sums, and what `stats()` says of them."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoti_sched import ConfigError, Histogram, Priority, SchedulerStats
from aoti_sched.engine.numbers import OUTCOMES as OUTCOME_BY_STATE
from aoti_sched.engine.numbers import plain
from aoti_sched.histograms import LEAST_SECONDS, LEAST_SIZE, EndedRequests, chosen, merged
from aoti_sched.queue import histogram as counted

SECONDS = st.floats(0, 1e4)


def of(values, least=LEAST_SECONDS):
    counts = counted.Histogram(least)
    for value in values:
        counts.add(value)
    return plain(counts)


def ended(outcome="completed", priority="NORMAL", queue=(), run=(), total=(), batch_size=()):
    return EndedRequests(
        outcome=outcome,
        priority=priority,
        queue=of(queue),
        run=of(run),
        total=of(total),
        batch_size=of(batch_size, LEAST_SIZE),
    )


def test_both_sides_mean_the_same_buckets():
    assert (LEAST_SECONDS, LEAST_SIZE) == (counted.LEAST_SECONDS, counted.LEAST_SIZE)
    for least in (LEAST_SECONDS, LEAST_SIZE):
        bounds = counted.bounds_from(least)
        full = of([*bounds, 1e9], least)
        assert full.counts == (1,) * (len(bounds) + 1)
        assert full.bounds == (*bounds, 1e9)


def test_bounds_double_in_two_steps():
    assert of([64e-6]).bounds == pytest.approx([8e-6, 12e-6, 16e-6, 24e-6, 32e-6, 48e-6, 64e-6])


@given(st.lists(SECONDS, min_size=1))
def test_every_value_is_in_the_one_bucket_that_has_it(values):
    histogram = of(values)
    assert histogram.count == len(values)
    low = -math.inf
    for count, high in zip(histogram.counts, histogram.bounds, strict=True):
        assert count == sum(low < value <= high for value in values)
        low = high
    assert histogram.sum == pytest.approx(sum(values))
    assert histogram.mean == pytest.approx(sum(values) / len(values))
    assert histogram.max == max(values)


@given(st.lists(SECONDS, min_size=1), st.floats(0, 1))
def test_a_quantile_is_off_by_half_of_itself_at_most(values, part):
    rank = max(0, math.ceil(part * len(values)) - 1)
    true = sorted(values)[rank]
    estimate = of(values).quantile(part)
    largest_known = counted.bounds_from(LEAST_SECONDS)[-1]
    if true <= largest_known:
        assert abs(estimate - true) <= max(LEAST_SECONDS, 0.5 * true) + 1e-12
    assert estimate <= max(values)


def test_the_usual_quantiles_are_properties():
    histogram = of([0.001] * 50 + [0.004] * 45 + [0.1] * 5)
    assert histogram.p50 <= 0.001024 < histogram.p90 <= 0.0041 < histogram.p99 <= 0.1


def test_an_empty_histogram_has_zeros():
    empty = Histogram(LEAST_SECONDS)
    assert (empty.count, empty.p50, empty.p99, empty.mean, empty.max) == (0, 0.0, 0.0, 0.0, 0.0)
    assert empty.bounds == ()
    assert empty + empty == empty


@given(st.lists(SECONDS), st.lists(SECONDS))
def test_a_sum_is_the_histogram_of_all_values(some, others):
    found, expected = of(some) + of(others), of(some + others)
    assert (found.counts, found.max) == (expected.counts, expected.max)
    assert found.sum == pytest.approx(expected.sum)


def test_seconds_and_sizes_can_not_be_added():
    with pytest.raises(ValueError, match=r"can't be added\. Add histograms of one unit"):
        of([1]) + of([1], LEAST_SIZE)


def test_a_histogram_crosses_a_wire():
    random.seed(5)
    histogram = of(random.expovariate(100) for _ in range(99))
    assert msgspec.json.decode(msgspec.json.encode(histogram), type=Histogram) == histogram


def test_merged_histograms_stay_apart_by_outcome_and_priority():
    parts = [
        ended(total=[1], queue=[0.5]),
        ended(total=[2]),
        ended("shed", total=[3]),
        ended(priority="HIGH", total=[4]),
    ]
    assert merged(parts) == (
        ended(priority="HIGH", total=[4]),
        ended(total=[1, 2], queue=[0.5]),
        ended("shed", total=[3]),
    )


def test_a_histogram_is_chosen_by_its_name_an_outcome_and_a_priority():
    parts = [
        ended(total=[1], run=[0.5], batch_size=[2]),
        ended(priority="HIGH", total=[2]),
        ended("failed", total=[3]),
    ]
    assert chosen(parts, "total", "completed", None) == of([1, 2])
    assert chosen(parts, "total", None, None) == of([1, 2, 3])
    assert chosen(parts, "total", None, "HIGH") == of([2])
    assert chosen(parts, "run", "completed", None) == of([0.5])
    assert chosen(parts, "batch_size", "completed", None) == of([2], LEAST_SIZE)
    with pytest.raises(ValueError, match="there are 'queue', 'run', 'total', 'batch_size'"):
        chosen(parts, "sum", None, None)


def test_a_scheduler_without_devices_has_empty_histograms():
    assert SchedulerStats(devices={}, rules="python").histogram().count == 0


OUTCOMES = (
    "'completed' or 'failed' or 'rejected' or 'expired' or 'cancelled' or 'revoked' or 'shed'"
)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"of": "totl"},
            "histogram(of): expected 'queue' or 'run' or 'total' or 'batch_size', got 'totl'.",
        ),
        ({"outcome": "done"}, f"histogram(outcome=): expected {OUTCOMES}, got 'done'."),
        ({"outcome": "COMPLETED"}, f"histogram(outcome=): expected {OUTCOMES}, got 'COMPLETED'."),
        (
            {"priority": "normal"},
            "histogram(priority=): expected 'HIGH' or 'NORMAL' or 'LOW', got 'normal'.",
        ),
        ({"priority": 7}, "histogram(priority=): expected 'HIGH' or 'NORMAL' or 'LOW', got 7."),
    ],
)
def test_a_histogram_that_can_not_be_is_refused(asked, message):
    stats = SchedulerStats(devices={}, rules="python")
    with pytest.raises(ConfigError) as caught:
        stats.histogram(**asked)
    assert str(caught.value) == message


@pytest.mark.parametrize("priority", [None, "HIGH", *Priority])
def test_a_priority_is_a_member_or_its_name(priority):
    assert SchedulerStats(devices={}, rules="python").histogram(priority=priority).count == 0


def test_every_outcome_can_be_asked_for():
    stats = SchedulerStats(devices={}, rules="python")
    for outcome in OUTCOME_BY_STATE.values():
        assert stats.histogram(outcome=outcome).count == 0


@given(st.lists(SECONDS, max_size=30))
def test_counts_can_be_read_between_any_two_values(values):
    counts, seen = counted.Histogram(LEAST_SECONDS), []
    for number, value in enumerate(values):
        seen.append(counts.counts)
        assert sum(seen[-1]) == number
        assert counts.counts == seen[-1]
        counts.add(value)
    bounds = [*counted.bounds_from(LEAST_SECONDS), math.inf]
    by_hand = [0] * len(bounds)
    for value in values:
        by_hand[next(i for i, bound in enumerate(bounds) if value <= bound)] += 1
    assert counts.counts == by_hand


# --- sizes ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5_000), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_of_sizes_is_a_size(sizes, part):
    value = of(sizes, LEAST_SIZE).quantile(part)
    assert value == int(value)
    assert 1 <= value <= max(sizes)


def test_batches_of_one_have_the_size_one():
    alone = of([1] * 8, LEAST_SIZE)
    assert (alone.p50, alone.p99, alone.mean) == (1.0, 1.0, 1.0)


# --- sums and mistakes ----------------------------------------------------------------------------


def test_histograms_of_several_processes_are_added_by_sum():
    parts = [of([1e-3, 2e-3]), of([5.0]), of([])]
    assert sum(parts) == of([1e-3, 2e-3, 5.0])


@pytest.mark.parametrize("other", [1, 1.5, "1", None])
def test_a_histogram_is_added_to_histograms_alone(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        of([1.0]) + other
    with pytest.raises(TypeError):
        other + of([1.0])


@pytest.mark.parametrize("part", [95, -0.1, math.nan])
def test_a_part_of_all_is_no_percentage(part):
    with pytest.raises(ConfigError, match=r"quantile\(.*\): expected a part of all, from"):
        of([1.0]).quantile(part)
