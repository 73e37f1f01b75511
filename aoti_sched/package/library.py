"""A bare shared library and the files that belong to it.

torch's `aot_compile` without packaging leaves `<stem>.so` in a directory with
`<stem>_metadata.json`, `<stem>.cpp` and the like, where the stem is a hash even when the library
was given a name. They belong together by name only, so the library's own stem is taken, and others
only where no other library lies beside. What is not there stays unknown.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path

from aoti_sched.errors import PackageFormatError
from aoti_sched.package.archive import FileDigest

LIBRARY_SUFFIXES = (".so", ".pyd")
MAGIC = (
    b"\x7fELF",
    b"MZ",  # Windows
    b"\xcf\xfa\xed\xfe",  # macOS
    b"\xca\xfe\xba\xbe",  # macOS, several machines in one
)
# What torch calls by its own names even when the library was given another, and what a model loads
# by name from its own directory.
_BY_NAME = (
    "*.wrapper.cpp",
    "*.wrapper.json",
    "*.wrapper_metadata.json",
    "*.wrapper_weights.blob",
    "*.kernel.cpp",
    "custom_objs_config.json",
    "custom_obj_*",
    "*.cubin",
    "*.fatbin",
    "*.hsaco",
    "*.spv",
)

_ELF_MACHINES = {21: "ppc64le", 22: "s390x", 62: "x86_64", 183: "aarch64", 243: "riscv64"}


class LibrarySource:
    """A library and its companions, as if they were members of a package."""

    def __init__(self, digest: FileDigest) -> None:
        """Find and hash the companions of the library that `digest` has hashed.

        Raises:
            PackageFormatError: the library is truncated.
        """
        self.path = digest.path
        self.machine = _elf_machine(digest)
        self._files = {digest.path.name: digest}
        for path in () if digest.contents is not None else _companions(digest.path):
            self._files[path.name] = FileDigest(path)
        self.members = {name: file.size for name, file in self._files.items()}
        self.key = self._combined_key(digest)

    def chunks(self, name: str) -> Iterator[bytes]:
        with io.BufferedReader(self._files[name].open()) as stream:
            while chunk := stream.read(1 << 20):
                yield chunk

    def _combined_key(self, digest: FileDigest) -> str:
        # Other weights beside the same library are another model.
        if len(self._files) == 1:
            return digest.sha256
        listing = "".join(f"{name}\0{self._files[name].sha256}\n" for name in sorted(self._files))
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def is_library(digest: FileDigest) -> bool:
    """Return whether the file is a shared library of any system, by its first bytes."""
    with digest.open() as stream:
        return (stream.read(4) or b"").startswith(MAGIC)


def _companions(library: Path) -> list[Path]:
    stem = library.with_suffix("")
    found = {
        stem.with_name(stem.name + ending)
        for ending in (".cpp", ".json", "_metadata.json", "_weights.blob")
    }
    if sum(path.suffix in LIBRARY_SUFFIXES for path in library.parent.iterdir()) == 1:
        for pattern in _BY_NAME:
            found.update(library.parent.glob(pattern))
    return sorted(path for path in found if path.is_file())


def _elf_machine(digest: FileDigest) -> str:
    """Return the machine an ELF library is for, "" when its header does not tell.

    Raises:
        PackageFormatError: its section table, which linkers write last, lies beyond the end of the
            file: mapping it would be SIGBUS.
    """
    with digest.open() as stream:
        header = stream.read(64) or b""
    if not header.startswith(b"\x7fELF"):
        return ""
    if len(header) < 64:
        raise _truncated(digest)
    order = "<" if header[5] == 1 else ">"
    if header[4] == 2:  # 64 bits
        (table,) = struct.unpack_from(order + "Q", header, 40)
        entry_size, entries = struct.unpack_from(order + "HH", header, 58)
        if table + entry_size * entries > digest.size:
            raise _truncated(digest)
    (machine,) = struct.unpack_from(order + "H", header, 18)
    return _ELF_MACHINES.get(machine, "")


def _truncated(digest: FileDigest) -> PackageFormatError:
    return PackageFormatError(
        f"{digest.path} is truncated: it is a shared library of which only {digest.size} bytes "
        "are there. Copy or compile it again.",
        path=str(digest.path),
    )
