"""Reading of files that may be hostile: bytes checked by hash, zip members by limits.

This room knows zip and sha256. It does not know what a model is, writes nothing, and decompresses
into memory or into the caller's hands only. A package arrives from a registry, a bucket, a
colleague: until its hash is known to be the expected one, its directory, its sizes and its member
names are claims.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import msgspec

from aoti_sched.errors import (
    PackageError,
    PackageFormatError,
    PackageHashError,
    PackageNotFoundError,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK = 1 << 20


class ReadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a package may claim before it is refused. All sizes in bytes.

    torch writes its members uncompressed, so `ratio` (a compressed member's declared growth)
    concerns only packages that something else has written again.
    """

    members: int = 50_000
    directory: int = 8 << 20
    total: int = 1 << 40
    ratio: int = 100
    json: int = 64 << 20
    source: int = 256 << 20


class FileDigest:
    """A file's sha256, and the means to read the file again without trusting it.

    The state of the hash after every block is kept (sha256 states can be copied), so a later read
    is verified block by block against the *same* hash: what is parsed, extracted and mapped is what
    was hashed, even when the file is rewritten in between. No descriptor is held open for
    this.
    """

    def __init__(self, path: Path, contents: bytes | None = None) -> None:
        """Hash the file at `path`, or `contents` in memory, which `path` only names.

        Raises:
            PackageNotFoundError: there is no such file.
            PackageFormatError: it is a directory, a device or the like.
            PackageError: the operating system refuses to read it.
        """
        self.path = path
        self.contents = contents
        self.began = time.time()
        """When reading began, in seconds since the epoch."""
        self.status: os.stat_result | None = None
        """The file's status when reading began; None for bytes in memory."""
        self._states = [hashlib.sha256()]
        size = 0
        try:
            with self._open() as file:
                if contents is None:
                    self.status = os.fstat(file.fileno())
                while block := file.read(_BLOCK):
                    state = self._states[-1].copy()
                    state.update(block)
                    self._states.append(state)
                    size += len(block)
        except OSError as error:
            raise _unreadable(path, error) from error
        self.size = size
        self.sha256 = self._states[-1].hexdigest()

    def open(self) -> VerifiedStream:
        try:
            return VerifiedStream(self, self._open())
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _open(self) -> io.FileIO | io.BytesIO:
        return open_regular_file(self.path) if self.contents is None else io.BytesIO(self.contents)

    def check(self, index: int, block: bytes) -> None:
        """Raise `PackageHashError` unless `block` is the block that was hashed at `index`."""
        state = self._states[index].copy()
        state.update(block)
        if state.digest() != self._states[index + 1].digest():
            raise PackageHashError(
                f"{self.path} changed after it was opened: its sha256 was {self.sha256}. Nothing "
                "of the changed file was used. Open it again; deploy packages by renaming a new "
                "file into place.",
                path=str(self.path),
            )


class VerifiedStream(io.RawIOBase):
    """The bytes that `FileDigest` hashed, or `PackageHashError`; never anything else."""

    def __init__(self, digest: FileDigest, file: io.FileIO | io.BytesIO) -> None:
        super().__init__()
        self._digest = digest
        self._file = file
        self._position = 0
        self._index = -1
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._digest.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._position >= self._digest.size:
            return 0
        index, start = divmod(self._position, _BLOCK)
        if index != self._index:
            self._block = self._read_block(index)
            self._index = index
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._block) - start)
        view[:count] = self._block[start : start + count]
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _read_block(self, index: int) -> bytes:
        wanted = min(_BLOCK, self._digest.size - index * _BLOCK)
        parts = bytearray()
        try:
            self._file.seek(index * _BLOCK)
            while len(parts) < wanted and (part := self._file.read(wanted - len(parts))):
                parts += part
        except OSError as error:
            raise _unreadable(self._digest.path, error) from error
        block = bytes(parts)
        self._digest.check(index, block)
        return block


class MemberSource(Protocol):
    """Where a model's files come from: a zip, or the files beside a bare library."""

    @property
    def path(self) -> Path: ...

    @property
    def key(self) -> str:
        """A hash of everything that `chunks` may yield: equal keys, equal files."""
        ...

    @property
    def members(self) -> Mapping[str, int]:
        """The size of every member, by name."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the member's verified bytes, exactly as many as `members` says."""
        ...


def read_member(source: MemberSource, name: str, limit: int) -> bytes:
    """Return one member in memory, refused when it declares more than `limit` bytes."""
    if source.members[name] > limit:
        raise PackageFormatError(
            f"{source.path}: member {name!r} claims {source.members[name]} bytes where at most "
            f"{limit} are plausible; refused.",
            path=str(source.path),
        )
    return b"".join(source.chunks(name))


class _Entry(msgspec.Struct, frozen=True):
    raw_name: bytes
    offset: int
    packed: int
    size: int
    crc: int
    deflated: bool


class ZipSource:
    """A zip's members, after every name, size and overlap in its directory has been checked."""

    def __init__(self, digest: FileDigest, limits: ReadLimits) -> None:
        """Read and check the directory; no member is read.

        Raises:
            PackageFormatError: not a zip, truncated, or a member that no honest package has; it is
                named.
        """
        self.path = digest.path
        self.key = digest.sha256
        self._digest = digest
        self._entries = self._read_directory(limits)
        self.members = {name: entry.size for name, entry in self._entries.items()}

    def chunks(self, name: str) -> Iterator[bytes]:
        entry = self._entries[name]
        with io.BufferedReader(self._digest.open(), buffer_size=_BLOCK) as stream:
            self._seek_to_data(stream, name, entry)
            crc = count = 0
            for chunk in (
                self._inflate(stream, name, entry) if entry.deflated else _stored(stream, entry)
            ):
                crc = zlib.crc32(chunk, crc)
                count += len(chunk)
                yield chunk
        if count != entry.size or crc != entry.crc:
            raise self._refuse(
                name, f"is damaged: {count} of {entry.size} bytes, or a wrong checksum"
            )

    def _read_directory(self, limits: ReadLimits) -> dict[str, _Entry]:
        try:
            with _DirectoryReader(self._digest, limits) as stream, zipfile.ZipFile(stream) as file:
                infos = file.infolist()
        except PackageError:
            raise
        # NotImplementedError is zipfile's word for an unsupported compression method.
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            EOFError,
            struct.error,
        ) as error:
            raise self._not_a_zip(error) from error
        if len(infos) > limits.members:
            raise PackageFormatError(
                f"{self.path} has {len(infos)} members, more than {limits.members}; refused.",
                path=str(self.path),
            )
        entries: dict[str, _Entry] = {}
        for info in infos:
            name = self._checked_name(info)
            if name in entries:
                raise self._refuse(name, "appears twice")
            entries[name] = self._checked_entry(info, name, limits)
        self._check_overlap(entries)
        total = sum(entry.size for entry in entries.values())
        if total > limits.total:
            raise PackageFormatError(
                f"{self.path} claims {total} bytes unpacked, more than {limits.total}; refused.",
                path=str(self.path),
            )
        return {name: entry for name, entry in entries.items() if not name.endswith("/")}

    def _checked_name(self, info: zipfile.ZipInfo) -> str:
        # zipfile cuts a name at a NUL byte; the whole one is what other tools would see.
        name = info.orig_filename.replace("\\", "/")
        parts = name.removesuffix("/").split("/")
        if (
            "\0" in name
            or any(part in ("", ".", "..") for part in parts)
            or re.match(r"[A-Za-z]:", name)
        ):
            raise self._refuse(
                info.orig_filename, "would lie outside the directory it is extracted to"
            )
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise self._refuse(name, "is a link or a device, not a file")
        return name

    def _checked_entry(self, info: zipfile.ZipInfo, name: str, limits: ReadLimits) -> _Entry:
        if info.header_offset < 0:
            raise self._refuse(name, "begins before the file does")
        if info.flag_bits & 0x1:
            raise self._refuse(name, "is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._refuse(
                name, f"uses compression method {info.compress_type}; torch stores its members"
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if not deflated and info.file_size != info.compress_size:
            raise self._refuse(
                name, f"claims {info.file_size} bytes but stores {info.compress_size}"
            )
        if info.file_size > max(_BLOCK, limits.ratio * info.compress_size):
            raise self._refuse(
                name,
                f"claims to grow from {info.compress_size} to {info.file_size} bytes, more than "
                f"{limits.ratio} times; torch stores its members uncompressed",
            )
        return _Entry(
            raw_name=info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"),
            offset=info.header_offset,
            packed=info.compress_size,
            size=info.file_size,
            crc=info.CRC,
            deflated=deflated,
        )

    def _check_overlap(self, entries: Mapping[str, _Entry]) -> None:
        # Many entries over the same bytes are how a small zip claims to be a huge one.
        ordered = sorted(entries.items(), key=lambda item: item[1].offset)
        for (name, entry), (_, following) in pairwise(ordered):
            if _end(entry) > following.offset:
                raise self._refuse(name, "overlaps another member")
        if ordered and _end(ordered[-1][1]) > self._digest.size:
            raise self._refuse(
                ordered[-1][0], "reaches beyond the end of the file; the file is truncated"
            )

    def _seek_to_data(self, stream: IO[bytes], name: str, entry: _Entry) -> None:
        stream.seek(entry.offset)
        header = stream.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise self._refuse(name, "has no header where the directory puts it")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        if stream.read(name_length) != entry.raw_name:
            raise self._refuse(name, "is called differently in the directory and in its own header")
        stream.seek(extra_length, os.SEEK_CUR)

    def _inflate(self, stream: IO[bytes], name: str, entry: _Entry) -> Iterator[bytes]:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        left = entry.size
        try:
            for packed in _stored(stream, entry):
                pending = packed
                while pending:
                    chunk = inflater.decompress(pending, _BLOCK)
                    pending = inflater.unconsumed_tail
                    left -= len(chunk)
                    if left < 0:
                        raise self._refuse(
                            name, f"holds more than the {entry.size} bytes it declares"
                        )
                    yield chunk
            while chunk := inflater.decompress(b"", _BLOCK):
                left -= len(chunk)
                if left < 0:
                    raise self._refuse(name, f"holds more than the {entry.size} bytes it declares")
                yield chunk
        except zlib.error as error:
            raise self._refuse(name, f"is damaged: {error}") from error
        if not inflater.eof or inflater.unused_data:
            raise self._refuse(
                name, "is damaged: its compressed data ends before or beyond its place"
            )

    def _refuse(self, name: str, why: str) -> PackageFormatError:
        return PackageFormatError(
            f"{self.path}: member {name!r} {why}; refused.", path=str(self.path)
        )

    def _not_a_zip(self, error: Exception) -> PackageFormatError:
        if self._digest.size == 0:
            what = "is empty"
        else:
            with self._digest.open() as stream:
                starts_as_zip = stream.read(4) == b"PK\x03\x04"
            what = (
                "is truncated: it begins as a zip, but its directory is missing or broken after "
                f"{self._digest.size} bytes"
                if starts_as_zip
                else "is neither a zip nor a shared library"
            )
        return PackageFormatError(
            f"{self.path} {what} ({error}). Expected a .pt2 package or a .so; copy or compile it "
            "again.",
            path=str(self.path),
        )


class _DirectoryReader(io.BufferedReader):
    """A reader for zipfile that refuses a directory larger than plausible."""

    def __init__(self, digest: FileDigest, limits: ReadLimits) -> None:
        super().__init__(digest.open())
        self._path = digest.path
        self._limit = limits.directory

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._limit:
            raise PackageFormatError(
                f"{self._path} has a directory of {size} bytes, more than {self._limit}; refused.",
                path=str(self._path),
            )
        return super().read(size)


def open_regular_file(path: Path) -> io.FileIO:
    """Open a plain file for reading, without blocking on a pipe; refuse anything else."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except IsADirectoryError:
        descriptor = -1
    if descriptor < 0 or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        if descriptor >= 0:
            os.close(descriptor)
        raise PackageFormatError(
            f"{path} is a directory or a device, not a file. Expected a .pt2 package or a .so.",
            path=str(path),
        )
    return io.FileIO(descriptor, "rb")


def _stored(stream: IO[bytes], entry: _Entry) -> Iterator[bytes]:
    left = entry.packed
    while left and (chunk := stream.read(min(left, _BLOCK))):
        left -= len(chunk)
        yield chunk


def _end(entry: _Entry) -> int:
    return entry.offset + 30 + len(entry.raw_name) + entry.packed


def _unreadable(path: Path, error: OSError) -> PackageError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return PackageNotFoundError(
            f"There is no package at {path}. Check the path, or make the package with "
            f"compile_package.",
            path=str(path),
        )
    return PackageError(f"Cannot read {path}: {error.strerror or error}.", path=str(path))
