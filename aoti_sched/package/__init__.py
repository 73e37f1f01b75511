"""What a package says about its models, read without torch and without loading native code.

A package is a `.pt2` file, which is a zip that may hold several models, or a bare `.so`. This room reads
it, describes each model, and puts a model's files where the loader can map them. It imports nothing
heavier than msgspec, and loads, unpickles and runs nothing. Its helpers: `archive` (bytes that are
verified), `library` (a bare library's companions), `sources` (facts in generated C++),
`platform` (this machine), `cache` (the unpacked files), `manifest` (what was unpacked), `trust` (who else
can write to a path).

A package is native code: reading it here is safe, loading it is running it.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from aoti_sched.arguments import file_name
from aoti_sched.errors import (
    InstructionSetError,
    ModelNotFoundError,
    PackageFormatError,
    PackageHashError,
    PlatformMismatchError,
)
from aoti_sched.package.archive import FileDigest, Limits, MemberSource, ZipSource, read_member
from aoti_sched.package.cache import unpack
from aoti_sched.package.library import LIBRARY_SUFFIXES, LibrarySource, is_library
from aoti_sched.package.platform import KNOWN_ISA, parse_isa, spelled_machine, this_cpu_isa
from aoti_sched.package.sources import WeightFacts, thread_facts, weight_facts


class WeightsLocation(enum.Enum):
    """Where a model's constants get their values at load."""

    IN_LIBRARY = "in_library"
    """In the shared library, which copies them at load."""
    BLOB = "blob"
    """In one file beside it, to be mapped and handed over."""
    PICKLED = "pickled"
    """In files that torch.load reads, one for each storage."""
    NO_CONSTANTS = "no_constants"
    """The model has none."""
    ABSENT = "absent"
    """Nowhere in the package: until the caller gives all of them, a run would crash the process."""
    UNKNOWN = "unknown"
    """The package does not say (a bare library without its sources). The loaded library can be asked."""


class PackagedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a package, as the package describes it. What it does not say is "" or empty."""

    path: str
    """The package, as the caller named it."""
    name: str
    library: str
    """The shared library's member in the package."""
    sources: tuple[str, ...]
    """The generated C++ sources' members. Without any, what stands only in them is unknown."""
    metadata: dict[str, str]
    """Everything in the metadata, the user's own keys included."""
    device: str
    """cpu, cuda, xpu or mps."""
    platform: str
    """As in `sys.platform`."""
    machine: str
    """As in `platform.machine()`, in one spelling: x86_64, aarch64."""
    cpu_isa: frozenset[str]
    """By torch's names, such as AVX2 and AVX512. A lower bound: unless told otherwise, torch lets the C++ compiler
    use everything the compiling CPU has (`-march=native`), and does not record what that was."""
    weights: WeightsLocation
    constant_bytes: int
    """Of all constants together, those computed from others included; 0 when it is not known, too."""
    needs_proxy_executor: bool
    """It calls operators (or holds objects) that only a proxy executor of torch can reach."""
    thread_limit: int | None
    """With more threads than this in a run, CPU kernels write beyond their buffers. None: no kernel sets a limit.
    Without sources it is 1, which every kernel bears."""
    fixed_threads: int | None
    """As many threads run in a kernel whatever is set at run time. None: no kernel insists."""


class StoredWeight(msgspec.Struct, frozen=True):
    """One constant in a file written by torch.save: a view of the tensor there. Several may share a file.

    `shape` and `stride` count elements, as does `offset` from the start of the storage.
    """

    file: Path
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Extracted(msgspec.Struct, frozen=True):
    """A model's files, unpacked. They are shared with other processes and must not be written to."""

    directory: Path
    """Holds the library and whatever it loads by name: GPU kernels, extern nodes, custom objects."""
    library: Path
    weights_blob: Path | None
    stored_weights: dict[str, StoredWeight]
    """The pickled constants by fully qualified name; empty when there are none."""


class Package:
    """A package that has been hashed and whose directory has been checked; made by `open_package`.

    It holds no file open. Later reads are verified against the hash taken at the start, so everything that
    comes out of one Package comes from the same bytes, or `PackageHashError` is raised.
    """

    def __init__(
        self,
        source: ZipSource | LibrarySource,
        sha256: str,
        limits: Limits,
        *,
        pinned: bool = False,
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
            _bare_layout(source) if isinstance(source, LibrarySource) else _zip_layouts(source)
        )
        self._described: dict[str, PackagedModel] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models in it, sorted. A bare library's is its file name without the suffix."""
        return tuple(sorted(self._layouts))

    def model(self, name: str | None = None) -> PackagedModel:
        """The description of one model; nothing is extracted.

        Args:
            name: which one. None takes the only one, or of several the one called "model", which is the
                name torch gives when asked for none.

        Raises:
            ModelNotFoundError: no such model, or several and none named; the message lists them.
            PackageFormatError: the model's files contradict each other or cannot be understood.
        """
        name = self._chosen(name)
        if name not in self._described:
            self._described[name] = self._describe(self._layouts[name])
        return self._described[name]

    def wrapper_source(self, model: PackagedModel | str | None = None) -> str | None:
        """The generated C++ wrapper, which states the inputs; None when the package does not bring it."""
        layout = self._layout(model)
        return None if layout.wrapper is None else self._text(layout.wrapper)

    def extract(
        self, model: PackagedModel | str | None = None, cache_dir: Path | None = None
    ) -> Extracted:
        """Unpack a model's files into the cache, or find them there. Blocking.

        The directory is named by the content, so the same package is unpacked once whatever it is called,
        and a library that is mapped somewhere is never written to. A bare library is copied for the same
        reason: the next build would overwrite it where it lies, and kill every process that has it mapped.

        What was unpacked earlier is read again when a file's size, times or inode changed, and compared with
        the package in every byte when `open_package` was given `sha256=`. What is broken is unpacked anew.

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
        files = dict(layout.files)
        for file, _, _, _ in stored.values():  # other models' weights stay where they are
            files[f"weights/{file}"] = layout.weight_files[file]
        directory = unpack(
            self._source,
            f"{self._source.key}-{_slug(layout.name)}",
            files,
            cache_dir,
            compare=self._pinned,
        )
        place = {member: directory / path for path, member in files.items()}
        return Extracted(
            directory=directory,
            library=place[layout.library],
            weights_blob=None if layout.blob is None else place[layout.blob],
            stored_weights={
                fqn: StoredWeight(place[layout.weight_files[file]], shape, stride, offset)
                for fqn, (file, shape, stride, offset) in stored.items()
            },
        )

    def _chosen(self, name: str | None) -> str:
        if name is not None and name in self._layouts:
            return name
        names = ", ".join(map(repr, self.models))
        if name is not None:
            raise ModelNotFoundError(
                f"{self.path} holds no model {name!r}; it holds {names}.", path=str(self.path)
            )
        if len(self._layouts) == 1:
            return self.models[0]
        if "model" in self._layouts:
            return "model"
        raise ModelNotFoundError(
            f"{self.path} holds several models: {names}. Say which one is meant.",
            path=str(self.path),
        )

    def _layout(self, model: PackagedModel | str | None) -> _Layout:
        return self._layouts[
            self._chosen(model.name if isinstance(model, PackagedModel) else model)
        ]

    def _describe(self, layout: _Layout) -> PackagedModel:
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

    def _weights(self, layout: _Layout, facts: WeightFacts | None) -> WeightsLocation:
        if facts is not None and facts.constants == 0:
            return WeightsLocation.NO_CONSTANTS
        if layout.blob is not None:
            return WeightsLocation.BLOB
        if facts is not None and facts.in_library:
            return WeightsLocation.IN_LIBRARY
        if self._stored_weights(layout):
            return WeightsLocation.PICKLED
        return WeightsLocation.UNKNOWN if facts is None else WeightsLocation.ABSENT

    def _needs_proxy_executor(self, layout: _Layout) -> bool:
        if layout.custom_objects is not None and self._json(layout.custom_objects, dict[str, str]):
            return True
        return layout.extern_nodes is not None and bool(
            self._json(layout.extern_nodes, _ExternNodes).nodes
        )

    def _stored_weights(self, layout: _Layout) -> _StoredWeights:
        """What weights_config.json lists. torch writes an empty one for a model without such weights."""
        if layout.weights_config is None:
            return {}
        stored = self._json(layout.weights_config, _StoredWeights)
        for fqn, (file, _, _, _) in stored.items():
            if file not in layout.weight_files:
                raise PackageFormatError(
                    f"{self.path}: {layout.weights_config!r} puts constant {fqn!r} into {file!r}, which is not there.",
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
    limits: Limits | None = None,
    contents: bytes | None = None,
) -> Package:
    """Read a `.pt2` package's directory, or find a bare library's companions. Blocking; loads no code.

    What the file is follows from its bytes, not from its name. The whole file is hashed, at a gigabyte or
    two per second.

    Args:
        path: the file.
        sha256: its hash in hexadecimal. With any other, nothing of the file is parsed, unpacked or mapped.
            For a bare library it speaks of the library alone, not of the files beside it.
            What was unpacked earlier is compared with the file at each `extract`.
        limits: what a package may claim; sizes in bytes.
        contents: the file's bytes, where it is in memory and `path` only names it. A library there has no companions.

    Raises:
        PackageNotFoundError: there is no file.
        PackageHashError: its hash is another, or `sha256` is no hash.
        PackageFormatError: it is not a package, truncated, or has a member no honest package has.
        PackageError: the operating system refuses to read it.
    """
    path = Path(file_name("open_package(path)", path))
    limits = Limits() if limits is None else limits
    if sha256 is not None and re.fullmatch(r"[0-9a-fA-F]{64}", sha256) is None:
        raise PackageHashError(
            f"sha256= for {path}: expected 64 hexadecimal digits, got {sha256!r}.", path=str(path)
        )
    digest = FileDigest(path, contents)
    if sha256 is not None and digest.sha256 != sha256.lower():
        raise PackageHashError(
            f"{path}: expected sha256 {sha256.lower()}, got {digest.sha256}. Nothing of it was used; check where the "
            "file comes from, or update the hash.",
            path=str(path),
        )
    source = LibrarySource(digest) if is_library(digest) else ZipSource(digest, limits)
    return Package(source, digest.sha256, limits, pinned=sha256 is not None)


def check_platform(model: PackagedModel, *, cpu_isa: frozenset[str] | None = None) -> None:
    """Refuse a model that was compiled for another system, machine or CPU than this one.

    What the model does not say is not judged, nor are instruction sets where this system does not tell its
    own (anything but Linux), nor names that a later torch may have introduced. Whether the model's device is
    there is its backend's question.

    Args:
        model: the model.
        cpu_isa: the instruction sets to compare with, by torch's names; None takes this CPU's.

    Raises:
        PlatformMismatchError: another operating system or machine.
        InstructionSetError: it needs instructions this CPU lacks; running it would be SIGILL.
    """
    here = spelled_machine()
    if model.platform not in ("", sys.platform) or model.machine not in ("", here):
        built = "/".join(filter(None, (model.platform, model.machine)))
        raise PlatformMismatchError(
            f"{model.path}: model {model.name!r} was compiled for {built}, this is {sys.platform}/{here}. "
            "Compile it here, or on a machine like this one.",
            path=model.path,
        )
    available = this_cpu_isa() if cpu_isa is None else cpu_isa
    if available is None:
        return
    missing = (model.cpu_isa & KNOWN_ISA) - available
    if missing:
        raise InstructionSetError(
            f"{model.path}: model {model.name!r} was compiled for {_listed(model.cpu_isa)}, but this CPU has "
            f"{_listed(available) or 'none of them'}: {_listed(missing)} is missing, and running it would kill the "
            "process. Compile it on a CPU like this one, or for less, with both ATEN_CPU_CAPABILITY=avx2 (what torch "
            "writes) and TORCHINDUCTOR_CPP_MARCH=x86-64-v3 (what the C++ compiler makes of it) set meanwhile.",
            path=model.path,
        )


# --- how a package is laid out ------------------------------------------------------------------------

_T = TypeVar("_T")
_StoredWeights = dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]]
"""weights_config.json: for each constant, its file, shape, stride and offset."""

# The top folder is the package's stem as it was when torch wrote it; before torch 2.7 there was none.
_MODEL_MEMBER = re.compile(
    r"(?P<root>(?:.*?/)?)data/aotinductor/(?P<model>[^/]+)/(?P<path>.+)", re.DOTALL
)


class _ExternNodes(msgspec.Struct):
    nodes: list[msgspec.Raw]


class _Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Which member of the package is what for one model. None: it is not there."""

    name: str
    library: str
    wrapper: str | None
    sources: tuple[str, ...]
    metadata: str | None
    extern_nodes: str | None
    custom_objects: str | None
    blob: str | None
    weights_config: str | None
    weight_files: dict[str, str]
    """The pickled weights' members by the names that weights_config.json uses."""
    files: dict[str, str]
    """What to unpack, pickled weights apart: for each path in the directory, the member it holds."""


def _zip_layouts(source: ZipSource) -> dict[str, _Layout]:
    models: dict[str, dict[str, str]] = {}
    roots: set[str] = set()
    for member in source.members:
        if match := _MODEL_MEMBER.fullmatch(member):
            models.setdefault(match["model"], {})[match["path"]] = member
            roots.add(match["root"])
    if not models:
        exported = any(re.search(r"(^|/)models/[^/]+\.json$", member) for member in source.members)
        raise PackageFormatError(
            f"{source.path} holds no compiled model"
            + (
                ", only an exported program: compile it"
                if exported
                else ". Expected a package written"
            )
            + " by torch._inductor.aoti_compile_and_package.",
            path=str(source.path),
        )
    if len(roots) > 1:
        raise PackageFormatError(
            f"{source.path} has models under several top folders: {', '.join(sorted(map(repr, roots)))}; refused.",
            path=str(source.path),
        )
    (root,) = roots
    return {name: _zip_layout(source, root, name, files) for name, files in models.items()}


def _zip_layout(source: ZipSource, root: str, name: str, files: Mapping[str, str]) -> _Layout:
    library = _library_among(source.path, name, files)
    weights = _members_under(source, f"{root}data/weights/")
    # torch's own loader puts custom objects beside the library, where the proxy executor looks for them.
    constants = _members_under(source, f"{root}data/constants/")
    objects = {path: member for path, member in constants.items() if path.startswith("custom_obj_")}
    return _layout(name, library, {**objects, **files}, weights)


def _bare_layout(source: LibrarySource) -> dict[str, _Layout]:
    name = source.path.stem
    return {
        name: _layout(name, source.path.name, {member: member for member in source.members}, {})
    }


def _layout(
    name: str, library: str, files: Mapping[str, str], weight_files: dict[str, str]
) -> _Layout:
    stem = _wrapper_stem(library, files)
    extern_nodes = files.get(f"{stem}.json")
    unpacked = dict(files)
    if extern_nodes is not None:  # torch's runners look for them under the library's own name
        unpacked[f"{_stem(library)}.json"] = extern_nodes
    return _Layout(
        name=name,
        library=files[library],
        wrapper=files.get(f"{stem}.cpp"),
        sources=tuple(sorted(member for path, member in files.items() if path.endswith(".cpp"))),
        metadata=files.get(f"{stem}_metadata.json"),
        extern_nodes=extern_nodes,
        custom_objects=files.get("custom_objs_config.json"),
        blob=files.get(f"{stem}_weights.blob"),
        weights_config=files.get("weights_config.json"),
        weight_files=weight_files,
        files=unpacked,
    )


def _wrapper_stem(library: str, files: Iterable[str]) -> str:
    """What the names of the wrapper and its companions begin with: as the library's, unless it was given a name."""
    stem = _stem(library)
    if f"{stem}_metadata.json" in files:
        return stem
    wrappers = [
        file.removesuffix("_metadata.json")
        for file in files
        if file.endswith(".wrapper_metadata.json")
    ]
    return wrappers[0] if len(wrappers) == 1 else stem


def _library_among(path: Path, model: str, files: Iterable[str]) -> str:
    """The model's own library. Kernels may be libraries too; only the model's has a wrapper's name or metadata."""
    libraries = [file for file in files if file.endswith(LIBRARY_SUFFIXES) and "/" not in file]
    if len(libraries) > 1:
        libraries = [file for file in libraries if _stem(file).endswith(".wrapper")] or [
            file for file in libraries if f"{_stem(file)}_metadata.json" in files
        ]
    if len(libraries) == 1:
        return libraries[0]
    if libraries:
        raise PackageFormatError(
            f"{path}: model {model!r} has several libraries: {', '.join(map(repr, sorted(libraries)))}.",
            path=str(path),
        )
    raise PackageFormatError(
        f"{path}: model {model!r} has no shared library. It may hold sources only (package_cpp_only): compile it "
        "without that option.",
        path=str(path),
    )


def _members_under(source: MemberSource, folder: str) -> dict[str, str]:
    return {member[len(folder) :]: member for member in source.members if member.startswith(folder)}


def _stem(file: str) -> str:
    return file.rpartition(".")[0]


def _slug(name: str) -> str:
    """A model's name as part of a directory's: itself where that is plain, else a hash of it."""
    if re.fullmatch(r"\w[\w.-]{0,63}", name, re.ASCII):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _listed(names: Iterable[str]) -> str:
    return " ".join(sorted(names))
