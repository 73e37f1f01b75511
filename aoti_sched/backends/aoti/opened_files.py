"""Opened files: the files of one pass over weights, opened in turn and checked for changes."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from aoti_sched.errors import WeightsFileError, clipped

Seen = dict[Path, tuple[int, ...]]
"""The identity of each file at the first look: device, inode, size and time of change."""


class OpenFiles:
    """The files of one pass. At most one file is open at a time."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._looked: set[Path] = set()
        self._open: tuple[Path, io.BufferedReader] | None = None

    def open(self, path: Path) -> io.BufferedReader:
        """Return a file, which stays open until another file is opened.

        Raises:
            WeightsFileError: The file can't be read, or has changed since the first look.
        """
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        self.close()
        self.look(path)
        try:
            file = path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from error
        self._open = (path, file)
        if _identity(os.fstat(file.fileno())) != self._seen[path]:
            raise _changed(path)
        return file

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def look(self, path: Path) -> None:
        """Record a file's identity, unless an earlier look has recorded it.

        Raises:
            WeightsFileError: The file can't be read, or is no plain file.
        """
        try:
            found = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise unreadable(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise fault(path, f"is {what}. Give the weights file itself, or its *.index.json.")
        self._seen.setdefault(path, _identity(found))
        self._looked.add(path)

    def check(self) -> None:
        """Check that no file of this pass has changed.

        Raises:
            WeightsFileError: A file has changed since the first look.
        """
        for path in self._looked:
            try:
                unchanged = _identity(path.stat()) == self._seen[path]
            except OSError:
                unchanged = False
            if not unchanged:
                raise _changed(path)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def fault(path: Path, what: str) -> WeightsFileError:
    """Return an error about a file; `what` is the text after the path."""
    return WeightsFileError(f"{clipped(path, 400)} {what}", path=str(path))


def unreadable(path: Path, error: Exception) -> WeightsFileError:
    """Return the error for a file that the system can't open or read."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return WeightsFileError(
            f"There is no weights file at {clipped(path, 400)}.", path=str(path)
        )
    why = error.strerror if isinstance(error, OSError) else None
    return WeightsFileError(f"Cannot read {clipped(path, 400)}: {why or error}.", path=str(path))


def _changed(path: Path) -> WeightsFileError:
    return fault(
        path,
        "changed while it was being read, or since its weights were loaded, so nothing of it was "
        "used. Write a new file, rename it into place, and then update from it.",
    )
