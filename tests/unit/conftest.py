"""Where torch is not installed, the test files whose subject is torch are skipped with that
reason.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

NEED_TORCH = {
    "test_batch_layout.py",
    "test_call_spec.py",
    "test_input_check.py",
    "test_probing.py",
    "test_weight_names.py",
}


class WithoutTorch(pytest.Module):
    """A test file that is not imported."""

    def collect(self):
        pytest.skip("torch is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    """Replace a file that imports torch, where torch is not installed."""
    if module_path.name in NEED_TORCH and importlib.util.find_spec("torch") is None:
        return WithoutTorch.from_parent(parent, path=module_path)
    return None
