"""What a user gives as a package: a path, or the bytes of one."""

from __future__ import annotations

import io

from aoti_sched.arguments import file_name
from aoti_sched.errors import ConfigError, brief
from aoti_sched.package.library import MAGIC

_LONGEST_PATH = 4096


def named(package: object) -> tuple[str, bytes | None]:
    """Return the path of a package, and its bytes where it is given as such.

    `bytes` are a package when they begin as one (a zip or a shared library), and otherwise a path
    as the operating system has it. Bytes in memory have a path for messages only. Of an
    `io.BytesIO` all is taken, wherever its position is.

    Raises:
        ConfigError: It is neither a path nor a package in memory.
    """
    if isinstance(package, io.BytesIO):
        return _in_memory(package.getvalue())
    if isinstance(package, (bytearray, memoryview)):
        return _in_memory(bytes(package))
    if isinstance(package, bytes) and (
        _is_package(package) or len(package) > _LONGEST_PATH or not package
    ):
        return _in_memory(package)
    if isinstance(package, io.IOBase) or hasattr(package, "read"):
        raise ConfigError(
            f"load({brief(package)}): path: an open file is not taken. Give its path, or its "
            "bytes: load(file.read())."
        )
    return file_name(f"load({brief(package)}): path", package), None


def _in_memory(contents: bytes) -> tuple[str, bytes]:
    if not _is_package(contents):
        raise ConfigError(
            f"load({brief(contents)}): path: these {len(contents)} bytes are neither a package (a "
            "zip or a shared library) nor a path."
        )
    kind = "pt2" if contents.startswith(b"PK") else "so"
    return f"model.{kind} (in memory)", contents


def _is_package(contents: bytes) -> bool:
    return contents.startswith((b"PK\x03\x04", b"PK\x05\x06", *MAGIC))
