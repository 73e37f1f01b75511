"""Layout: finds the members of each model of a package, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from aoti_sched.errors import PackageFormatError
from aoti_sched.package.archive import MemberSource, ZipSource
from aoti_sched.package.library import LIBRARY_SUFFIXES, LibrarySource

# The top folder is the package's stem as it was when torch wrote it; before torch 2.7 there was
# none.
_MODEL_MEMBER = re.compile(
    r"(?P<root>(?:.*?/)?)data/aotinductor/(?P<model>[^/]+)/(?P<path>.+)", re.DOTALL
)


class ModelLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The members of a package that belong to one model; None for a member that is not there."""

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
    """The members to unpack, without pickled weights, by their paths in the directory."""


def zip_layouts(source: ZipSource) -> dict[str, ModelLayout]:
    """Return the layout of each model of a zip package, by the model's name.

    Raises:
        PackageFormatError: The package has no compiled model, or models under several top folders.
    """
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
            f"{source.path} has models under several top folders: "
            f"{', '.join(sorted(map(repr, roots)))}. Package the models anew.",
            path=str(source.path),
        )
    (root,) = roots
    return {name: _zip_layout(source, root, name, files) for name, files in models.items()}


def _zip_layout(source: ZipSource, root: str, name: str, files: Mapping[str, str]) -> ModelLayout:
    library = _library_among(source.path, name, files)
    weights = _members_under(source, f"{root}data/weights/")
    # torch's own loader puts custom objects beside the library, where the proxy executor looks for
    # them.
    constants = _members_under(source, f"{root}data/constants/")
    objects = {path: member for path, member in constants.items() if path.startswith("custom_obj_")}
    return _layout(name, library, {**objects, **files}, weights)


def bare_layout(source: LibrarySource) -> dict[str, ModelLayout]:
    """Return the layout of the one model of a bare library, by the model's name."""
    name = source.path.stem
    return {
        name: _layout(name, source.path.name, {member: member for member in source.members}, {})
    }


def _layout(
    name: str, library: str, files: Mapping[str, str], weight_files: dict[str, str]
) -> ModelLayout:
    stem = _wrapper_stem(library, files)
    extern_nodes = files.get(f"{stem}.json")
    unpacked = dict(files)
    if extern_nodes is not None:  # torch's runners read the file under the library's own name
        unpacked[f"{_stem(library)}.json"] = extern_nodes
    return ModelLayout(
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
    """Return the beginning of the names of the wrapper and its companions.

    The stem is the library's, unless the library was given a name.
    """
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
    """Return the model's own library.

    Kernels may be libraries too. Only the model's library has a wrapper's name or metadata.
    """
    libraries = [file for file in files if file.endswith(LIBRARY_SUFFIXES) and "/" not in file]
    if len(libraries) > 1:
        libraries = [file for file in libraries if _stem(file).endswith(".wrapper")] or [
            file for file in libraries if f"{_stem(file)}_metadata.json" in files
        ]
    if len(libraries) == 1:
        return libraries[0]
    if libraries:
        raise PackageFormatError(
            f"{path}: model {model!r} has several libraries: "
            f"{', '.join(map(repr, sorted(libraries)))}.",
            path=str(path),
        )
    raise PackageFormatError(
        f"{path}: model {model!r} has no shared library. It may hold sources only "
        "(package_cpp_only): compile it without that option.",
        path=str(path),
    )


def _members_under(source: MemberSource, folder: str) -> dict[str, str]:
    return {member[len(folder) :]: member for member in source.members if member.startswith(folder)}


def _stem(file: str) -> str:
    return file.rpartition(".")[0]
