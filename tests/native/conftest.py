"""Without the compiled module there are no native lanes: then their tests are left out, and the header says so."""

from __future__ import annotations

import importlib.util

_BUILT = importlib.util.find_spec("aoti_sched.backends.native._native") is not None

collect_ignore = [] if _BUILT else ["test_lanes.py", "test_fork_and_exit.py", "test_executor.py"]


def pytest_report_header() -> str:
    return f"native lanes: {'built' if _BUILT else 'NOT BUILT, so their tests are left out'}"
