"""Fixtures that give really compiled models, and what each test leaves behind.

Anything else belongs beside the tests that use it.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.models import BuiltModel


LONGEST = {
    "test_benchmarks.py",
    "test_cancellation.py",
    "test_command_line.py",
    "test_examples.py",
    "test_sanitizers.py",
    "test_traps.py",
}
"""Files that take half a minute or more on a core."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files.

    A file's tests stay in one process, and the other one must not wait for it at the end.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what collecting has made, torch's modules and the tests, out of garbage collections.

    Nothing of that is garbage, and to visit it takes a third of a second each time that a test
    asks for a collection.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let garbage collections see all objects again."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    """Leave structlog unconfigured, which `structlog.testing.capture_logs` does not."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()


@pytest.fixture
def built() -> Callable[[str], BuiltModel]:
    """`built("mlp")`: the compiled model of that name, from the cache or built now."""
    pytest.importorskip("torch")  # the unit tests also run where it is not installed
    from tests.models import build

    return build
