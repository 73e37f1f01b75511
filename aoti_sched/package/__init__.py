"""What a package says about its models, read without torch and without loading native code.

A package is a `.pt2` file, which is a zip that may hold several models, or a bare `.so`. This room
reads it, describes each model, and puts a model's files where the loader can map them. It imports
nothing heavier than msgspec, and loads, unpickles and runs nothing. Its helpers: `archive` (bytes
that are verified), `library` (a bare library's companions), `sources` (facts in generated C++),
`platform` (this machine), `cache` (the unpacked files), `known` (what an earlier load found out),
`manifest` (what was unpacked), `trust` (which other users can write to a path).

A package is native code: reading it here is safe, loading it is running it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aoti_sched.package.description import (
        Extracted,
        PackagedModel,
        StoredWeight,
        WeightsLocation,
    )
    from aoti_sched.package.package import Package, find_package, open_package
    from aoti_sched.package.platform import check_capability, check_platform

_HOMES = {
    "Extracted": "description",
    "Package": "package",
    "PackagedModel": "description",
    "StoredWeight": "description",
    "WeightsLocation": "description",
    "check_capability": "platform",
    "check_platform": "platform",
    "find_package": "package",
    "open_package": "package",
}
"""The module of each name, which is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


__all__ = [
    "Extracted",
    "Package",
    "PackagedModel",
    "StoredWeight",
    "WeightsLocation",
    "check_capability",
    "check_platform",
    "find_package",
    "open_package",
]
