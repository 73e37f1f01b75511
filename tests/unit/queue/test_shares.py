"""Which of several runners a request of a split goes to."""

from collections import Counter

import pytest

from aoti_sched.queue.selection.shares import Shares


def dealt(shares, count):
    return [shares.next() for _ in range(count)]


def test_requests_are_dealt_in_proportion_and_evenly():
    assert dealt(Shares({"a": 3.0, "b": 1.0}), 8) == list("aabaaaba")


@pytest.mark.parametrize(
    "parts",
    [
        {"a": 0.9, "b": 0.1},
        {"a": 1, "b": 2, "c": 4},
        {"a": 0.3, "b": 0.3, "c": 0.4},
        {"a": 1e-3, "b": 1e6},
    ],
    ids=str,
)
def test_each_runner_has_its_part_of_any_number_of_requests(parts):
    shares, whole, counts = Shares(parts), sum(parts.values()), Counter()
    for number in range(1, 2001):
        counts[shares.next()] += 1
        for name, part in parts.items():
            assert abs(counts[name] - number * part / whole) < len(parts)


def test_a_runner_without_a_share_gets_nothing():
    shares = Shares({"a": 0.0, "b": 1.0})
    assert {*dealt(shares, 20), *(shares.of(str(n)) for n in range(20))} == {"b"}


def test_keys_are_spread_by_the_shares():
    shares = Shares({"a": 3.0, "b": 1.0})
    counts = Counter(shares.of(f"tenant {number}") for number in range(4000))
    # 5 standard deviations of a binomial distribution
    assert abs(counts["a"] - 3000) < 5 * (4000 * 0.75 * 0.25) ** 0.5


def test_equal_keys_belong_to_one_runner_in_every_process():
    """The rule gives these on every machine and with every version of Python."""
    shares = Shares({"old": 1.0, "new": 1.0})
    assert "".join(shares.of(str(number))[0] for number in range(12)) == "nnoonooononn"
    assert shares.of("\ud800") == shares.of("\ud800")


def test_only_keys_move_that_must():
    """To the runner that gets more, and from those that get less."""
    before, after = Shares({"a": 0.9, "b": 0.1}), Shares({"a": 0.7, "b": 0.3})
    moves = Counter((before.of(str(n)), after.of(str(n))) for n in range(4000))
    assert moves["b", "a"] == 0
    assert abs(moves["a", "b"] - 800) < 5 * (4000 * 0.2 * 0.8) ** 0.5
