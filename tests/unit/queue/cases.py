"""Cases that the random walks must meet, and few seeds that together meet all of them.

After a change of the walks, find seeds again with `python -m tests.unit.queue.cases`.
The command walks 2,400 seeds (about a minute) and prints a greedy cover of the cases.
"""

from __future__ import annotations

from tests.unit.queue.plain_parts import LIVE
from tests.unit.queue.walks import Walk

STEPS = 80

RULES = {
    *("overdue", "waits for cores", "late", "probed", "waits for its tenant", "too many wait"),
    *("refused by prediction", "waits by prediction", "several are shed"),
    *("a batch", "a batch inline", "a batch behind another", "a rider expires"),
    *("a rider is late", "grows no more", "leaves the loop", "a rider does not fit"),
    *("a rider does not pay", "a rider is too hurried", "a batch hurries"),
    *("shorter rides", "longer rides", "a promise", "no promise"),
    *("a short leader", "several behind one"),
    *("leaves a loop that is behind", "one of a turn"),
    *("run again", "run again behind another", "gathers", "ripens"),
    *("withdrawn ", "withdrawn room", "withdrawn tenant", "withdrawn epoch"),
    *("a lane that the slot keeps", "a lane that another slot keeps", "more lanes"),
}
"""Rarer rules of the plain model, by the names in `PlainModel.met`."""

ANSWERS = {
    *("launch", "grant", "expire", "revoke", "shed", "drained", "reached", "failing"),
    *("next turn", "withdraw", "in", "illegal"),
    *("QueueFullError", "RunnerClosedError", "LeaseError", "EpochError"),
    "DeadlineUnreachableError",
}
"""Commands by their names, rejections by their errors, and facts that are illegal."""

STATES = {
    *LIVE,
    *("DONE", "FAILED", "REJECTED", "EXPIRED", "CANCELLED", "REVOKED", "SHED", "WITHDRAWN"),
}
"""States in which jobs are when a walk is over."""

CASES = {
    *(("rule", rule) for rule in RULES),
    *(("answer", answer) for answer in ANSWERS),
    *(("state", state) for state in STATES),
}

COVER = (28, 574, 1050, 49, 112, 16, 347, 32, 109, 836)
"""Seeds whose walks together meet every case."""


def cases_of(walk):
    """Return the cases that a walk meets, those included that `CASES` does not name."""
    met = {("rule", rule) for rule in walk.model.met}
    met |= {("state", job.state) for job in walk.model.jobs}
    for answer in walk.answers:
        for command in ["illegal"] if answer == "illegal" else answer:
            said = command if isinstance(command, str) else command[0]
            met.add(("answer", command[2] if said == "reject" else said))
    return met


def greedy_cover(met):
    """Return seeds that together meet every case, given the cases that each seed meets.

    Each step takes the seed with the most cases that are still open; the lowest on a tie.
    """
    open_cases, cover = set(CASES), []
    while open_cases:
        best = max(met, key=lambda seed: (len(met[seed] & open_cases), -seed))
        if not met[best] & open_cases:
            raise AssertionError(f"no seed meets {sorted(open_cases)}")
        open_cases -= met[best]
        cover.append(best)
    return cover


if __name__ == "__main__":
    print(*greedy_cover({seed: cases_of(Walk(seed, STEPS)) for seed in range(2400)}), sep=", ")
