"""Libraries of models as if an older torch had compiled them: what came after it is hidden."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aoti_sched.backends.aoti.c_abi import FUNCTIONS, Library
from aoti_sched.backends.aoti.constant_map import map_type
from aoti_sched.errors import MissingCapabilityError

NATIVE = "aoti_sched.backends.native._native"
with_maps = pytest.mark.skipif(map_type() is None, reason="the native module is not built")


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


class OlderLibrary(Library):
    """A library as if an older torch had compiled it."""

    compiled_by = "2.12"

    def has(self, name: str) -> bool:
        return version(FUNCTIONS[name].since) <= version(self.compiled_by) and super().has(name)

    def function(self, name: str) -> Callable[..., int]:
        if not self.has(name):
            raise MissingCapabilityError(name)
        return super().function(name)
