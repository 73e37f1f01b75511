"""Fixtures that give really compiled models. Anything else belongs beside the tests that use it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.models import BuiltModel, build


@pytest.fixture
def built() -> Callable[[str], BuiltModel]:
    """`built("mlp")`: the compiled model of that name, from the cache or built now."""
    return build
