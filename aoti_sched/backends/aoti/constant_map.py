"""The map in which constants travel to and from models that a torch before 2.13 compiled.

The functions of those models take a `std::unordered_map<std::string, AtenTensorHandle>`. Only C++
can make such a map; the native module does, where it was built. Newer models have a function that
takes pairs instead, whose name also ends in "Pairs" or "Entries". Neither function takes over the
handles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aoti_sched.backends.aoti.c_abi import FUNCTIONS, ConstantEntry, Library
from aoti_sched.backends.aoti.constants import Constant
from aoti_sched.backends.native.missing import missing
from aoti_sched.errors import MissingCapabilityError

if TYPE_CHECKING:
    import torch

    from aoti_sched.backends.native._native import ConstantMap

UPDATE, UPDATE_PAIRS = (
    "AOTInductorModelContainerUpdateConstantBuffer",
    "AOTInductorModelContainerUpdateConstantBufferPairs",
)
EXTRACT, EXTRACT_ENTRIES = (
    "AOTInductorModelContainerExtractConstantsMap",
    "AOTInductorModelContainerExtractConstantsMapEntries",
)


def map_type() -> type[ConstantMap] | None:
    """Return the native map type; None where the native module is missing."""
    try:
        from aoti_sched.backends.native._native import ConstantMap
    except ImportError:
        return None
    return ConstantMap


def why_not_updatable(library: Library, constants: Sequence[Constant]) -> str:
    """Return why the constants can't be read and written by pairs or by maps; "" when they can."""
    lacking = [name for name in (UPDATE_PAIRS, EXTRACT_ENTRIES) if not library.has(name)]
    if not lacking:
        return ""
    if not (library.has(UPDATE) and library.has(EXTRACT)):
        # A model with EXTRACT (2.8) has maps with the std::string of torch's wheels since 2.6.
        listed = ", ".join(f"{name} (torch {FUNCTIONS[name].since})" for name in lacking)
        return (
            f"an older torch compiled it, and its library lacks {listed}; compile it again with "
            "torch 2.13 or newer"
        )
    if map_type() is None:
        why, remedy = missing()
        return (
            f"a torch before 2.13 compiled it, whose code takes constants in a C++ map, and {why}, "
            f"so it can't build one; {remedy}, or compile the model again with torch 2.13 or newer"
        )
    if misplaces(constants):
        return (
            "a torch before 2.13 compiled it, whose code writes what comes after a folded "
            "constant to the wrong place (pytorch/pytorch#179225); compile it again with torch "
            "2.13 or newer"
        )
    return ""


def misplaces(constants: Sequence[Constant]) -> bool:
    """Return whether code of a torch before 2.13 would write beyond a constant's memory.

    Such code keeps the offsets of constants that are not folded, but looks an offset up by a number
    that counts all constants. The offset is right only if the folded constants come last.

    Args:
        constants: The constants in the runtime's order.
    """
    folded = [constant.spec.folded for constant in constants]
    return folded != sorted(folded)


def entries(
    pairs: list[tuple[Constant, torch.Tensor]], handles: list[int]
) -> ctypes.Array[ConstantEntry]:
    """Return the array that the C ABI takes: each constant's internal name and its handle."""
    names = [constant.spec.name.encode() for constant, _ in pairs]
    return (ConstantEntry * len(pairs))(*map(ConstantEntry, names, handles))


def mapped(pairs: list[tuple[Constant, torch.Tensor]], handles: list[int]) -> ConstantMap:
    """Return `entries` as a map for older models. Keep the map while C uses its address."""
    made = map_type()
    if made is None:
        why, remedy = missing()
        raise MissingCapabilityError(f"C++ maps can't be made: {why}. To change that, {remedy}.")
    return made(
        [(constant.spec.name, handle) for (constant, _), handle in zip(pairs, handles, strict=True)]
    )
