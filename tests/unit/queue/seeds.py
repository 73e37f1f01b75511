"""Seeds of random walks: the same ones in every run, and fresh ones beside them.

The fixed seeds find what a change breaks; the fresh ones find what no run has met yet.
A failure names its seed. `AOTI_SCHED_WALKS=2400` walks as many fixed seeds.
"""

from __future__ import annotations

import os
import random

import pytest

FIXED = int(os.environ.get("AOTI_SCHED_WALKS", "150"))
FRESH = 50


def shares(count):
    """Return the numbers of `count` shares. The first one is enough to measure coverage."""
    return [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, count))]


def share_of_seeds(share, shares):
    """Return one test's share of the fixed seeds, and of fresh ones, which are printed."""
    source = random.SystemRandom()
    fresh = [source.randrange(10**6, 10**9) for _ in range(-(-FRESH // shares))]
    print("fresh seeds:", *fresh)
    return [*range(FIXED)[share::shares], *fresh]
