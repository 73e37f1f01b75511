"""The search: it climbs to the top, and looks at a part of the grid."""

import random

import pytest

from aoti_sched.cli.search import Climb, grid


def hill(top):
    return lambda point: (-float(sum(abs(a - b) for a, b in zip(point, top, strict=True))),)


@pytest.mark.parametrize("seed", [1, 2, None])
def test_a_single_hill_is_climbed_from_anywhere(seed):
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print("seed", seed)
    draw = random.Random(seed)
    lengths = [draw.randint(1, 9) for _ in range(4)]
    top, start = (tuple(draw.randrange(length) for length in lengths) for _ in range(2))
    climb = Climb(lengths, hill(top))
    climb.run([start])
    assert climb.best()[0] == top


def test_a_part_of_the_grid_is_enough():
    lengths = [8] * 4
    climb = Climb(lengths, hill((5, 2, 7, 3)))
    climb.run([(0, 0, 0, 0)])
    assert climb.best()[0] == (5, 2, 7, 3)
    assert len(climb.scores) < 8**4 / 10


def test_every_point_is_looked_at_once():
    seen = []

    def score(point):
        seen.append(point)
        return hill((3, 3))(point)

    Climb([5, 5], score).run([(0, 0), (4, 4), (0, 0)])
    assert len(seen) == len(set(seen))


def test_a_start_finds_a_hill_that_another_does_not():
    def score(point):
        return max(hill((0,))(point), (hill((9,))(point)[0] + 1,))

    alone = Climb([10], score)
    alone.run([(1,)])
    assert alone.best()[0] == (0,)
    both = Climb([10], score)
    both.run([(1,), (8,)])
    assert both.best()[0] == (9,)


def test_two_axes_may_change_at_once():
    # Only the points with a sum of 4 are allowed, as threads times instances within the cores.
    climb = Climb([5, 5], hill((4, 0)), allows=lambda point: sum(point) == 4)
    climb.run([(0, 4)])
    assert climb.best()[0] == (4, 0)
    assert {sum(point) for point in climb.scores} == {4}


def test_the_limit_is_kept():
    climb = Climb([100], hill((99,)), limit=7)
    climb.run([(0,)])
    assert len(climb.scores) == 7
    assert climb.best()[0] == (6,)


def test_of_equal_points_the_one_looked_at_first_is_best():
    climb = Climb([3, 3], lambda _: (0.0,))
    climb.run([(1, 1), (0, 0)])
    assert climb.best()[0] == (1, 1)


def test_the_grid_has_every_point():
    assert list(grid([("a", "b"), (1, 2, 3)])) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
