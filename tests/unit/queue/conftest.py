"""Most of these tests measure the coverage of `queue/`: they have the mark `covering`.

The others have the mark `long`. They add nothing to the coverage, and take several times as long
while it is measured: those of `test_growth.py` and `test_fairness.py` took 45 s of a core instead
of 7 s, on Python 3.11.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder that are not marked `long`."""
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("long") is None:
            item.add_marker("covering")
