"""Missing: says why the native module is missing, and what to do about that."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec


class Missing(NamedTuple):
    """Why there are no native lanes.

    Attributes:
        why: The cause, as a clause.
        remedy: What to do, as a clause.
    """

    why: str
    remedy: str


def missing() -> Missing:
    """Return why native lanes are missing in this process, and what to do."""
    tree = tree_not_installed()
    if tree is not None:
        return Missing(
            f"aoti_sched is imported from the source tree {tree}, which is not installed in place",
            f"run `pip install -e {tree}`",
        )
    return Missing(
        "aoti_sched was installed without a C++ compiler",
        "install a compiler (g++) and reinstall aoti_sched",
    )


def tree_not_installed(package: Path = Path(__file__).parents[2]) -> Path | None:
    """Return the source tree that this package is imported from, unless it is installed in place.

    Python imports the package from the current folder where a program is started with `python -m`
    in the source tree, also where another copy is installed.

    Args:
        package: The folder of the package.
    """
    tree = package.resolve().parent
    if not (tree / "pyproject.toml").is_file() or _is_installed_in_place(tree):
        return None
    return tree


def _is_installed_in_place(tree: Path) -> bool:
    """Return whether `pip install -e` was run for a source tree, as pip's records say."""
    for found in importlib.metadata.distributions(name="aoti_sched"):
        try:
            record = msgspec.json.decode(found.read_text("direct_url.json") or "", type=_Record)
        except msgspec.MsgspecError:  # from an index, or damaged
            continue
        folder = Path(unquote(urlsplit(record.url).path))
        if record.dir_info.editable and folder.resolve() == tree:
            return True
    return False


class _Folder(msgspec.Struct):
    editable: bool = False


class _Record(msgspec.Struct):
    """The file `direct_url.json` of an installation, as PEP 610 defines it."""

    url: str
    dir_info: _Folder = msgspec.field(default_factory=_Folder)
