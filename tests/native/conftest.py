"""Without the compiled module there are no native lanes: then their tests are left out, and the
summary says so.
"""

from __future__ import annotations

import importlib.util

import pytest

_BUILT = importlib.util.find_spec("aoti_sched.backends.native._native") is not None

collect_ignore = (
    []
    if _BUILT
    else [
        "test_batches.py",
        "test_constant_map.py",
        "test_executor.py",
        "test_fork_and_exit.py",
        "test_lanes.py",
        "test_stub.py",
        "test_tensors.py",
        "test_without_torch.py",
    ]
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _BUILT:
        terminalreporter.write_line(
            f"NATIVE LANES ARE NOT BUILT: {', '.join(collect_ignore)} were left out"
        )
