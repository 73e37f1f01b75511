"""The map of constants that C++ code of compiled models reads and fills: what goes in and comes
out.
"""

import pytest

from aoti_sched.backends.native import _native


def test_a_map_holds_what_it_was_made_of():
    pairs = [(f"constant_{number}", 64 * number) for number in range(1, 1000)]
    assert sorted(_native.ConstantMap(pairs).pairs()) == sorted(pairs)
    assert _native.ConstantMap([]).pairs() == []


def test_of_a_name_given_twice_the_first_counts():
    assert _native.ConstantMap([("weight", 64), ("weight", 128)]).pairs() == [("weight", 64)]


def test_names_and_handles_may_be_of_any_kind():
    pairs = [("", 0), ("größe", 2**64 - 1), ("a" * 100_000, 1)]
    assert sorted(_native.ConstantMap(pairs).pairs()) == sorted(pairs)


def test_each_map_lies_in_a_place_of_its_own():
    maps = [_native.ConstantMap([]) for _ in range(100)]
    assert len({one.address() for one in maps}) == 100
    assert 0 not in {one.address() for one in maps}


@pytest.mark.parametrize(
    "pairs", [None, [("weight", -1)], [("weight", 2**64)], [("weight",)], [(1, 1)]]
)
def test_what_is_no_name_with_an_address_is_refused(pairs):
    with pytest.raises(TypeError):
        _native.ConstantMap(pairs)
