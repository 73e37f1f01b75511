"""Random walks of facts: the core and the plain model say the same, and the invariants hold
throughout.

A failure names its seed; `Walk(seed, STEPS)` is that walk again.
"""

from __future__ import annotations

import itertools
import math

import pytest

from aoti_sched.queue.admission.shedding import VICTIMS
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.histogram import LEAST_SECONDS, LEAST_SIZE, bounds_from
from aoti_sched.queue.job import JobState
from tests.unit.queue.cases import CASES, COVER, STEPS, cases_of, greedy_cover
from tests.unit.queue.plain_model import PlainModel
from tests.unit.queue.plain_parts import LIVE, LOOP
from tests.unit.queue.seeds import share_of_seeds, shares
from tests.unit.queue.support import check
from tests.unit.queue.walks import Player, Walk, answer_of

SHARES = 8  # tests to spread the walks over, so that a failure leaves the others to look at

NAMES = ("queue", "run", "total", "batch_size")
ORDERED = ("launch", "grant", "expire", "shed", "withdraw")


def sorted_out(commands):
    """Commands whose order is promised, in it; then the others, in any order."""
    if commands == "illegal":
        return commands
    ordered = [c for c in commands if c[0] in ORDERED]
    withdrawn = [c for c in ordered if c[0] == "withdraw"]
    if len(withdrawn) > SLICE:  # their order is promised within a slice
        ordered = sorted(withdrawn) + [c for c in ordered if c[0] != "withdraw"]
    return ordered, sorted(c for c in commands if c[0] not in ORDERED)


def states(model):
    return [job.state for job in model.jobs]


def histograms_of(runner):
    """Return the buckets, the sum and the largest value of each histogram of a runner."""
    return {
        (JobState(state).name, priority): {
            name: (made.counts, made.sum, made.max)
            for name in NAMES
            for made in (getattr(ended, name),)
        }
        for state, priority, ended in runner.histograms.each()
    }


def sorted_by_hand(values):
    """Return what `histograms_of` must return for the plain model's values."""
    return {
        kind: {
            name: (buckets(of[name], name), sum(of[name]), max(of[name], default=0.0))
            for name in NAMES
        }
        for kind, of in values.items()
    }


def buckets(values, name):
    bounds = bounds_from(LEAST_SIZE if name == "batch_size" else LEAST_SECONDS)
    edges = [-math.inf, *bounds, math.inf]
    return [sum(low < v <= high for v in values) for low, high in itertools.pairwise(edges)]


def compare_ends(walk, player):
    """Everything that is left after a walk, on both sides."""
    model, queue = walk.model, player.queue
    for plain, real in zip(model.runners, player.runners, strict=True):
        assert real.phase.name == plain.phase
        assert real.counters.as_dict() == plain.counters
        assert histograms_of(real) == sorted_by_hand(plain.values)
        assert real.rejections == plain.rejections
        assert sorted(real.free) == model.free_slots(plain)
        assert (queue.runners.get(real.name) is real) is not plain.removed
        leases = [
            lease.number for lease in model.leases if lease.runner is plain and not lease.over
        ]
        assert sorted(real.leases) == leases
        assert (real.epoch, real.published, real.closed) == (
            plain.epoch,
            plain.published,
            plain.closed,
        )
    assert queue.busy_lanes == len({run.lane for run in model.runs if run.lane != LOOP})


def wake_is_asked_for_the_earliest(jobs, ripe_times, player, *, exact):
    """For no later than it is needed and, if `exact`, not in vain."""
    needed, of_some_use = ripe_times
    deadlines = {j.deadline for j in jobs if j.deadline is not None and j.state.name in LIVE}
    wake = math.inf if player.wake is None else player.wake
    if wake > min(deadlines | needed, default=math.inf):
        return False
    return not exact or wake >= min(deadlines | of_some_use, default=math.inf)


@pytest.mark.parametrize("share", shares(SHARES))
def test_the_core_does_what_the_plain_model_says(share):
    """The same facts give the same commands, too, to a queue that is checked and to one that is
    not.
    """
    for seed in share_of_seeds(share, SHARES):
        walk = Walk(seed, STEPS)
        player, unchecked = Player(**walk.device), Player(**walk.device)
        for step, (fact, answer) in enumerate(zip(walk.facts, walk.answers, strict=True)):
            told = f"seed {seed}, fact {step}: {fact}"
            commands = player.play(*fact)
            assert sorted_out(commands) == sorted_out(answer), told
            assert (commands, player.wake) == (unchecked.play(*fact), unchecked.wake), told
            try:
                check(player.queue)
            except AssertionError as error:
                raise AssertionError(told) from error
            ticked = fact[0] == "tick"
            times = walk.ripe_times[step]
            assert wake_is_asked_for_the_earliest(player.jobs, times, player, exact=ticked), told
        assert [job.state.name for job in player.jobs] == states(walk.model), f"seed {seed}"
        try:
            compare_ends(walk, player)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, at its end") from error


def test_the_walks_meet_every_case():
    """A walk that never meets a case proves nothing about it."""
    met = set()
    for seed in COVER:
        met |= cases_of(Walk(seed, STEPS))
    assert sorted(CASES - met) == [], (
        "no walk of COVER meets these; `cases.py` says how to find seeds"
    )
    assert sorted(met - CASES) == [], "`cases.py` does not name these"


def test_walks_ask_for_what_is_illegal():
    walks = [Walk(seed, STEPS) for seed in range(40)]
    assert sum(answer == "illegal" for walk in walks for answer in walk.answers) > 20


@pytest.mark.parametrize("case", ["shed", "ripens"])
def test_a_case_that_is_not_met_is_named(case):
    met = {
        seed: {met for met in cases_of(Walk(seed, STEPS)) if met[1] != case} for seed in (63, 112)
    }
    with pytest.raises(AssertionError, match=case):
        greedy_cover(met)


LOW_JOB = {
    "priority": 2,
    "deadline": None,
    "bytes": 0,
    "is_lease_request": False,
    "min_epoch": 0,
}
UNBOUNDED_ON_LANES = ((None, None, None), ("lane", 0, 0, 0, 0, math.inf))


def submissions(runner, *wishes, first=0, wait=False):
    """Facts that submit jobs to a runner by its number; the first job has the number `first`."""
    return [
        ("submit", (0.0, number, ("runner", runner), wait, wish))
        for number, wish in enumerate(wishes, first)
    ]


def played_on_both(facts, *, jobs=None, size=None):
    """The plain model after these facts, and the answer to the last, which both sides give."""
    device = {"lanes": 1, "jobs": jobs, "size": size, "budget": 1, "cores": None}
    model, player = PlainModel(**device), Player(**device)
    for fact in facts:
        answer = answer_of(model, *fact)
        assert sorted_out(player.play(*fact)) == sorted_out(answer)
        check(player.queue)
    return model, answer


@pytest.mark.parametrize(("count", "sheds"), [(VICTIMS, True), (VICTIMS + 1, False)])
def test_the_plain_model_knows_how_many_jobs_a_newcomer_sheds(count, sheds):
    small, large = LOW_JOB | {"bytes": 1}, LOW_JOB | {"priority": 0, "bytes": count}
    facts = [("add_runner", ("r", 1, *UNBOUNDED_ON_LANES, {"sheds": True}))]
    facts += submissions(0, LOW_JOB, *[small] * count, large)
    model, _ = played_on_both(facts, size=count)
    assert [job.state for job in model.jobs].count("SHED") == count * sheds


def test_the_plain_model_serves_others_between_two_slices_of_expired_jobs():
    due, lease = LOW_JOB | {"deadline": 1.0}, LOW_JOB | {"priority": 1, "is_lease_request": True}
    facts = [("add_runner", (name, 1, *UNBOUNDED_ON_LANES, {})) for name in ("busy", "other")]
    facts += submissions(0, LOW_JOB)
    facts += submissions(1, *[due | {"priority": 0}] * SLICE, lease, due, first=1)
    _, commands = played_on_both([*facts, ("tick", (1.0,))])
    assert [command[0] for command in commands] == ["expire"] * SLICE + ["grant", "expire"]


def test_the_plain_model_expires_the_earliest_first_after_a_slice_of_late_jobs():
    high, normal, low = (
        LOW_JOB | {"priority": priority, "deadline": deadline}
        for priority, deadline in enumerate((1.0, 1.0, 0.5))
    )
    facts = [("add_runner", ("r", 1, *UNBOUNDED_ON_LANES, {}))]
    facts += submissions(0, LOW_JOB, *[high] * SLICE, normal, low)
    _, commands = played_on_both([*facts, ("complete", (1.0, 0, True))])
    order = [*range(1, SLICE + 1), SLICE + 2, SLICE + 1]
    assert commands == [("expire", number) for number in order]


@pytest.mark.parametrize(("count", "goes_on"), [(SLICE - 1, False), (SLICE, True)])
def test_the_plain_model_goes_on_after_a_slice_of_withdrawn_jobs(count, goes_on):
    facts = [("add_runner", ("r", 1, *UNBOUNDED_ON_LANES, {}))]
    facts += submissions(0, LOW_JOB | {"deadline": 1.0}, *[LOW_JOB] * count)
    _, commands = played_on_both([*facts, ("withdraw", (1.0, 0))])
    assert (("expire", 0) in commands) == goes_on


@pytest.mark.parametrize(("count", "goes_on"), [(SLICE - 1, False), (SLICE, True)])
def test_the_plain_model_goes_on_after_a_slice_of_admitted_jobs(count, goes_on):
    large, small = LOW_JOB | {"bytes": SLICE}, LOW_JOB | {"bytes": 1}
    facts = [("add_runner", ("r", 1, *UNBOUNDED_ON_LANES, {}))]
    facts += submissions(0, LOW_JOB | {"deadline": 1.0}, large)
    facts += submissions(0, *[small] * count, first=2, wait=True)
    _, commands = played_on_both([*facts, ("cancel", (1.0, 1))], size=SLICE)
    assert commands == [("expire", 0)] * goes_on


@pytest.mark.parametrize(("count", "launched"), [(SLICE - 1, SLICE - 1), (SLICE, 0)])
def test_the_plain_model_moves_a_slice_of_jobs_whose_epoch_has_come(count, launched):
    low = LOW_JOB | {"min_epoch": 2}
    facts = [("add_runner", ("r", 1, *UNBOUNDED_ON_LANES, {}))]
    facts += submissions(0, *[low] * count, low | {"priority": 0})
    facts += [("close_barrier", (0.0, 0, False)), ("open_barrier", (0.0, 0, 2))]
    _, commands = played_on_both(facts, jobs=1)
    assert [command[1] for command in commands] == [launched]
