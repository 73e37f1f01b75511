"""What a package says about its models, read without torch and without loading native code.

A package is a `.pt2` file, which is a zip that may hold several models, or a bare `.so`. This room
reads it, describes each model, and puts a model's files where the loader can map them. It imports
nothing heavier than msgspec, and loads, unpickles and runs nothing. Its helpers: `archive` (bytes
that are verified), `library` (a bare library's companions), `sources` (facts in generated C++),
`platform` (this machine), `cache` (the unpacked files), `known` (what an earlier load found out),
`manifest` (what was unpacked), `trust` (which other users can write to a path).

A package is native code: reading it here is safe, loading it is running it.
"""

from aoti_sched.package.description import (
    Extracted,
    PackagedModel,
    StoredWeight,
    WeightsLocation,
)
from aoti_sched.package.package import Package, find_package, open_package
from aoti_sched.package.platform import check_capability, check_platform

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
