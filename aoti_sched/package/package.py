"""`Package`: a `.pt2` file or a bare library that was hashed and checked, and reading from it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TypeVar

import msgspec

from aoti_sched.arguments import file_name
from aoti_sched.errors import ModelNotFoundError, PackageFormatError, PackageHashError
from aoti_sched.package.archive import FileDigest, ReadLimits, ZipSource, read_member
from aoti_sched.package.cache import unpack
from aoti_sched.package.description import (
    Extracted,
    ModelFiles,
    PackagedModel,
    WeightsLocation,
)
from aoti_sched.package.known import (
    FileState,
    KnownModel,
    KnownPackage,
    recall,
    remember,
    settled_state,
)
from aoti_sched.package.layout import ModelLayout, bare_layout, zip_layouts
from aoti_sched.package.library import LibrarySource, is_library
from aoti_sched.package.platform import parse_isa, spelled_machine
from aoti_sched.package.sources import WeightFacts, thread_facts, weight_facts

_T = TypeVar("_T")
_StoredWeights = dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]]
"""weights_config.json: for each constant, its file, shape, stride and offset."""


class _ExternNodes(msgspec.Struct):
    nodes: list[msgspec.Raw]


class Package:
    """A package that has been hashed and whose directory has been checked; made by `open_package`.

    It holds no file open. Later reads are verified against the hash taken at the start, so
    everything that comes out of one Package comes from the same bytes, or `PackageHashError` is
    raised.
    """

    def __init__(
        self,
        source: ZipSource | LibrarySource,
        sha256: str,
        limits: ReadLimits,
        *,
        pinned: bool = False,
        state: FileState | None = None,
    ) -> None:
        self.path = source.path
        """The file, as the caller named it."""
        self.sha256 = sha256
        """Of the file, in lower case."""
        self._source = source
        self._limits = limits
        self._pinned = (
            pinned  # the caller named the hash: what was unpacked earlier is compared with the file
        )
        self._layouts = (
            bare_layout(source) if isinstance(source, LibrarySource) else zip_layouts(source)
        )
        self._state = state  # None where nothing is to be remembered of the file
        self._described: dict[str, PackagedModel] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models in it, sorted.

        A bare library's is its file name without the suffix.
        """
        return tuple(sorted(self._layouts))

    def model(self, name: str | None = None) -> PackagedModel:
        """Return the description of one model; nothing is extracted.

        Args:
            name: which one. None takes the only one, or of several the one called "model", which is
                the name torch gives when asked for none.

        Raises:
            ModelNotFoundError: no such model, or several and none named; the message lists them.
            PackageFormatError: the model's files contradict each other or cannot be understood.
        """
        name = self._chosen(name)
        if name not in self._described:
            self._described[name] = self._describe(self._layouts[name])
        return self._described[name]

    def wrapper_source(self, model: PackagedModel | str | None = None) -> str | None:
        """Return the generated C++ wrapper, which states the inputs; None without one."""
        layout = self._layout(model)
        return None if layout.wrapper is None else self._text(layout.wrapper)

    def extract(
        self, model: PackagedModel | str | None = None, cache_dir: Path | None = None
    ) -> Extracted:
        """Unpack a model's files into the cache, or find them there. Blocking.

        The directory is named by the content, so the same package is unpacked once whatever it is
        called, and a library that is mapped somewhere is never written to. A bare library is copied
        for the same
        reason: the next build would overwrite it where it lies, and kill every process that has it
            mapped.

        What was unpacked earlier is read again when a file's size, times or inode changed, and
        compared with the package in every byte when `open_package` was given `sha256=`. What is
        broken is unpacked anew.

        Args:
            model: as in `model`.
            cache_dir: instead of `$AOTI_SCHED_CACHE` or the user's cache directory.

        Raises:
            PackageError: the cache directory cannot be used, or another user could write to it.
            PackageFormatError: a member is damaged.
            PackageHashError: the file changed since it was opened.
        """
        layout = self._layout(model)
        stored = self._stored_weights(layout)
        members = dict(layout.files)
        for file, _, _, _ in stored.values():  # other models' weights stay where they are
            members[f"weights/{file}"] = layout.weight_files[file]
        path = {member: path for path, member in members.items()}
        files = ModelFiles(
            key=f"{self._source.key}-{_slug(layout.name)}",
            sizes={path: self._source.members[member] for path, member in members.items()},
            library=path[layout.library],
            weights_blob=None if layout.blob is None else path[layout.blob],
            wrapper=None if layout.wrapper is None else path[layout.wrapper],
            stored_weights={
                fqn: (path[layout.weight_files[file]], shape, stride, offset)
                for fqn, (file, shape, stride, offset) in stored.items()
            },
        )
        directory = unpack(self._source, files.key, members, cache_dir, compare=self._pinned)
        if self._state is not None:
            default = self._default()
            known = KnownModel(self.model(layout.name), files)
            remember(self.path, self._state, self.sha256, default, known, cache_dir)
        return files.within(directory)

    def _chosen(self, name: str | None) -> str:
        if name is not None and name in self._layouts:
            return name
        names = ", ".join(map(repr, self.models))
        if name is not None:
            raise ModelNotFoundError(
                f"{self.path} holds no model {name!r}; it holds {names}.", path=str(self.path)
            )
        if (default := self._default()) is not None:
            return default
        raise ModelNotFoundError(
            f"{self.path} holds several models: {names}. Say which one is meant.",
            path=str(self.path),
        )

    def _default(self) -> str | None:
        """Return the model that is meant where none is named; None among several."""
        if len(self._layouts) == 1:
            return self.models[0]
        return "model" if "model" in self._layouts else None

    def _layout(self, model: PackagedModel | str | None) -> ModelLayout:
        return self._layouts[
            self._chosen(model.name if isinstance(model, PackagedModel) else model)
        ]

    def _describe(self, layout: ModelLayout) -> PackagedModel:
        metadata = {} if layout.metadata is None else self._json(layout.metadata, dict[str, str])
        sources = {member: self._text(member) for member in layout.sources}
        threads = thread_facts(sources.values())
        machine = metadata.get("AOTI_MACHINE", "")
        if not machine and isinstance(self._source, LibrarySource):
            machine = self._source.machine
        facts = None if layout.wrapper is None else weight_facts(sources[layout.wrapper])
        return PackagedModel(
            path=str(self.path),
            name=layout.name,
            library=layout.library,
            sources=layout.sources,
            metadata=metadata,
            device=metadata.get("AOTI_DEVICE_KEY", ""),
            platform=metadata.get("AOTI_PLATFORM", ""),
            machine=spelled_machine(machine),
            cpu_isa=parse_isa(metadata.get("AOTI_CPU_ISA", "")),
            weights=self._weights(layout, facts),
            constant_bytes=0 if facts is None else facts.bytes,
            needs_proxy_executor=self._needs_proxy_executor(layout),
            thread_limit=threads.limit if sources else 1,
            fixed_threads=threads.fixed,
        )

    def _weights(self, layout: ModelLayout, facts: WeightFacts | None) -> WeightsLocation:
        if facts is not None and facts.constants == 0:
            return WeightsLocation.NO_CONSTANTS
        if layout.blob is not None:
            return WeightsLocation.BLOB
        if facts is not None and facts.in_library:
            return WeightsLocation.IN_LIBRARY
        if self._stored_weights(layout):
            return WeightsLocation.PICKLED
        return WeightsLocation.UNKNOWN if facts is None else WeightsLocation.ABSENT

    def _needs_proxy_executor(self, layout: ModelLayout) -> bool:
        if layout.custom_objects is not None and self._json(layout.custom_objects, dict[str, str]):
            return True
        return layout.extern_nodes is not None and bool(
            self._json(layout.extern_nodes, _ExternNodes).nodes
        )

    def _stored_weights(self, layout: ModelLayout) -> _StoredWeights:
        """Return the entries of weights_config.json.

        Torch writes an empty one for a model without such weights.
        """
        if layout.weights_config is None:
            return {}
        stored = self._json(layout.weights_config, _StoredWeights)
        for fqn, (file, _, _, _) in stored.items():
            if file not in layout.weight_files:
                raise PackageFormatError(
                    f"{self.path}: {layout.weights_config!r} puts constant {fqn!r} into {file!r}, "
                    "which is not there.",
                    path=str(self.path),
                )
        return stored

    def _text(self, member: str) -> str:
        return read_member(self._source, member, self._limits.source).decode("utf-8", "replace")

    def _json(self, member: str, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(
                read_member(self._source, member, self._limits.json), type=kind
            )
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PackageFormatError(
                f"{self.path}: member {member!r} is not the JSON that torch writes there: {error}.",
                path=str(self.path),
            ) from error


def open_package(
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    limits: ReadLimits | None = None,
    contents: bytes | None = None,
) -> Package:
    """Read a `.pt2` package's directory, or find a bare library's companions.

    Blocking; loads no code.

    What the file is follows from its bytes, not from its name. The whole file is hashed, at a
    gigabyte or two per second.

    Args:
        path: the file.
        sha256: its hash in hexadecimal. With any other, nothing of the file is parsed, unpacked or
            mapped. For a bare library it speaks of the library alone, not of the files beside it.
            What was unpacked earlier is compared with the file at each `extract`.
        limits: what a package may claim; sizes in bytes.
        contents: the file's bytes, where it is in memory and `path` only names it. A library there
            has no companions.

    Raises:
        PackageNotFoundError: there is no file.
        PackageHashError: its hash is another, or `sha256` is no hash.
        PackageFormatError: it is not a package, truncated, or has a member no honest package has.
        PackageError: the operating system refuses to read it.
    """
    path = Path(file_name("open_package(path)", path))
    limits = ReadLimits() if limits is None else limits
    if sha256 is not None and re.fullmatch(r"[0-9a-fA-F]{64}", sha256) is None:
        raise PackageHashError(
            f"sha256= for {path}: expected 64 hexadecimal digits, got {sha256!r}.", path=str(path)
        )
    digest = FileDigest(path, contents)
    if sha256 is not None and digest.sha256 != sha256.lower():
        raise PackageHashError(
            f"{path}: expected sha256 {sha256.lower()}, got {digest.sha256}. Nothing of it was "
            "used; check where the file comes from, or update the hash.",
            path=str(path),
        )
    if is_library(digest):
        return Package(LibrarySource(digest), digest.sha256, limits, pinned=sha256 is not None)
    # Of a bare library nothing is remembered: what belongs to it are the files beside it.
    return Package(
        ZipSource(digest, limits),
        digest.sha256,
        limits,
        pinned=sha256 is not None,
        state=settled_state(digest),
    )


def find_package(
    path: Path,
    model: str | None = None,
    *,
    sha256: str | None = None,
    contents: bytes | None = None,
    cache_dir: Path | None = None,
) -> Package | KnownPackage:
    """Return a package for one of its models: as it is known from an earlier load, or read anew.

    A package is known where its file has not changed since it was extracted to the cache. It is
    read anew where `sha256` or `contents` is given. Blocking; loads no code.

    Args:
        path: The file.
        model: The model that is wanted, as in `Package.model`.
        sha256: As in `open_package`.
        contents: As in `open_package`.
        cache_dir: As in `Package.extract`.

    Raises:
        PackageError: As `open_package`, or the cache directory can't be used or trusted.
    """
    if sha256 is None and contents is None:
        known = recall(path, model, cache_dir)
        if known is not None:
            return known
    return open_package(path, sha256=sha256, contents=contents)


def _slug(name: str) -> str:
    """Return a model's name as part of a directory's: the name where it is plain, else its hash."""
    if re.fullmatch(r"\w[\w.-]{0,63}", name, re.ASCII):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
