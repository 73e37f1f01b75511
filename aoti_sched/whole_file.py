"""Whole file: writes a file whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to, beside a file. It replaces the file when the block succeeds.

    Args:
        path: The file.

    Raises:
        OSError: The file can't be replaced. The error names the file, not the path beside it.
    """
    target = Path(path)
    if target.name in ("", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    # With the cuts, the name has at most 255 bytes, as a file system takes them.
    stem, suffix = target.stem[:40], target.suffix[:16]
    beside = target.with_name(f".{stem}-{secrets.token_hex(4)}{suffix}")
    try:
        yield beside
        beside.replace(target)
    except OSError as error:
        if error.filename is None or str(error.filename) != str(beside):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
