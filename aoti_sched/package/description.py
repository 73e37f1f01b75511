"""What the package room says about models: plain values, without any reading."""

from __future__ import annotations

import enum
from pathlib import Path

import msgspec


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
    """The package does not say (a bare library without its sources).

    The loaded library can be asked.
    """


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
    """By torch's names, such as AVX2 and AVX512.

    A lower bound: unless told otherwise, torch lets the C++ compiler use everything the compiling
    CPU has (`-march=native`), and does not record what that was.
    """
    weights: WeightsLocation
    constant_bytes: int
    """Of all constants together, those computed from others included; 0 when it is not known, too.
    """
    needs_proxy_executor: bool
    """It calls operators (or holds objects) that only a proxy executor of torch can reach."""
    thread_limit: int | None
    """With more threads than this in a run, CPU kernels write beyond their buffers.

    None: no kernel sets a limit. Without sources it is 1, which every kernel bears.
    """
    fixed_threads: int | None
    """As many threads run in a kernel whatever is set at run time. None: no kernel insists."""


class StoredWeight(msgspec.Struct, frozen=True):
    """One constant in a file written by torch.save: a view of the tensor there.

    Several may share a file.

    `shape` and `stride` count elements, as does `offset` from the start of the storage.
    """

    file: Path
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Extracted(msgspec.Struct, frozen=True):
    """A model's files, unpacked.

    They are shared with other processes and must not be written to.
    """

    directory: Path
    """Holds the library and whatever it loads by name:

    GPU kernels, extern nodes, custom objects.
    """
    library: Path
    weights_blob: Path | None
    stored_weights: dict[str, StoredWeight]
    """The pickled constants by fully qualified name; empty when there are none."""


class ModelFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's files by their paths in the directory that they are unpacked to."""

    key: str
    """The cache entry: a hash of the files' bytes, and the model's name."""
    sizes: dict[str, int]
    """Of every file."""
    library: str
    weights_blob: str | None
    wrapper: str | None
    stored_weights: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]]
    """File, shape, stride and offset of each pickled constant, by fully qualified name."""

    def within(self, directory: Path) -> Extracted:
        """Return the files as they lie in `directory`."""
        return Extracted(
            directory=directory,
            library=directory / self.library,
            weights_blob=None if self.weights_blob is None else directory / self.weights_blob,
            stored_weights={
                fqn: StoredWeight(directory / file, shape, stride, offset)
                for fqn, (file, shape, stride, offset) in self.stored_weights.items()
            },
        )
