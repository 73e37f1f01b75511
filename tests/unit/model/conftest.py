"""Where torch is not installed, the tests whose subject is tensors are left out, and the report says so."""

from __future__ import annotations

import importlib.util

NEED_TORCH = ["test_batch_layout.py", "test_call_spec.py", "test_input_check.py"]

collect_ignore = [] if importlib.util.find_spec("torch") else NEED_TORCH


def pytest_report_header():
    if collect_ignore:
        return f"torch is not installed; left out: {', '.join(collect_ignore)}"
    return None
