"""Random walks of facts: the core and the plain model say the same, and the invariants hold throughout.

A failure names its seed; `Walk(seed, STEPS)` is that walk again.
"""

from __future__ import annotations

import math

import msgspec
import pytest

from tests.queue.plain_model import LIVE
from tests.queue.walks import Player, Walk

STEPS = 60
SEEDS = range(2400)
SHARES = 8  # tests to spread the walks over, so that a failure leaves the others to look at

ORDERED = ("launch", "grant", "expire")


def sorted_out(commands):
    """Commands whose order is promised, in it; then the others, in any order."""
    if commands == "illegal":
        return commands
    return [c for c in commands if c[0] in ORDERED], sorted(c for c in commands if c[0] not in ORDERED)


def states(model):
    return [job.state for job in model.jobs]


def compare_ends(walk, player):
    """Everything that is left after a walk, on both sides."""
    model, queue = walk.model, player.queue
    for plain, real in zip(model.runners, player.runners, strict=True):
        assert real.phase.name == plain.phase
        assert msgspec.structs.asdict(real.counters) == plain.counters
        assert sorted(real.free) == model.free_slots(plain)
        assert (queue.runners.get(real.name) is real) is not plain.removed
        leases = [lease.number for lease in model.leases if lease.runner is plain and not lease.over]
        assert sorted(real.leases) == leases
        assert (real.epoch, real.published, real.closed) == (plain.epoch, plain.published, plain.closed)
    assert queue.busy_lanes == len({job.lane for job in model.jobs if job.on_lane and not job.inline})


def wake_is_asked_for_the_earliest(walk_jobs, player, *, exact):
    deadlines = [j.deadline for j in walk_jobs if j.deadline is not None and j.state.name in LIVE]
    companies = [runner.company for runner in player.runners if runner.company is not None]
    keys = [key for company in companies for key in company.keys.values()]
    deadlines += [key.ripe_at for key in keys if not (key.ripe or key.held) and key.ripe_at < math.inf]
    if any(key.held for key in keys):
        exact = False  # its time may have been seen already
    if not deadlines:
        return not exact or player.wake is None
    return player.wake == min(deadlines) if exact else player.wake <= min(deadlines)


@pytest.mark.parametrize("share", range(SHARES))
def test_the_core_does_what_the_plain_model_says(share):
    for seed in SEEDS[share::SHARES]:
        walk = Walk(seed, STEPS)
        player = Player(*walk.device)
        for step, (fact, answer) in enumerate(zip(walk.facts, walk.answers, strict=True)):
            told = f"seed {seed}, fact {step}: {fact}"
            commands = player.play(*fact)
            assert sorted_out(commands) == sorted_out(answer), told
            try:
                player.queue.check()
            except AssertionError as error:
                raise AssertionError(told) from error
            ticked = fact[0] == "tick"
            assert wake_is_asked_for_the_earliest(player.jobs, player, exact=ticked), told
        assert [job.state.name for job in player.jobs] == states(walk.model), f"seed {seed}"
        try:
            compare_ends(walk, player)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, at its end") from error


def test_the_same_facts_give_the_same_commands_whether_checked_or_not():
    for seed in SEEDS[:100]:
        walk = Walk(seed, STEPS)
        one, other = Player(*walk.device), Player(*walk.device)
        for step, fact in enumerate(walk.facts):
            said = one.play(*fact)
            one.queue.check()
            assert (said, one.wake) == (other.play(*fact), other.wake), f"seed {seed}, fact {step}: {fact}"


def test_the_walks_go_everywhere():
    """A walk that never meets a case proves nothing about it."""
    said, ends, illegal = set(), set(), 0
    for seed in SEEDS[:100]:
        walk = Walk(seed, STEPS)
        for answer in walk.answers:
            if answer == "illegal":
                illegal += 1
            else:
                said |= {command[0] if command[0] != "reject" else command[2] for command in answer}
        ends |= set(states(walk.model))
    assert said == {
        *("launch", "grant", "expire", "revoke", "drained", "reached", "next turn"),
        *("QueueFullError", "RunnerClosedError", "LeaseError", "EpochError"),
    }
    assert ends == {
        *LIVE,
        *("DONE", "FAILED", "REJECTED", "EXPIRED", "CANCELLED", "REVOKED"),
    }
    assert illegal > 20
