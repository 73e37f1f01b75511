"""Most of these tests measure the coverage of `queue/`: they have the mark `covering`.

The others have the mark `long`. They add nothing to the coverage, and measuring it would make them
four times as long.
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
