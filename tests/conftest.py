"""Fixtures that give really compiled models. Anything else belongs beside the tests that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.models import BuiltModel


@pytest.fixture
def built() -> Callable[[str], BuiltModel]:
    """`built("mlp")`: the compiled model of that name, from the cache or built now."""
    pytest.importorskip("torch")  # the unit tests also run where it is not installed
    from tests.models import build

    return build
