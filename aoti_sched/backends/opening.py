"""Opening: the part of loading a model that is the same on every kind of device.

Loading has two steps, so that memory can be reserved between them. `inspect_package` reads, checks
and extracts a package, and runs none of its code. `open_container` loads the library and makes the
container. Both block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from aoti_sched.backends.aoti.c_abi import Library
from aoti_sched.backends.aoti.proxy_executor import open_proxy_executor
from aoti_sched.backends.contracts import Container, Inspected, LoadRequest
from aoti_sched.errors import PlatformMismatchError
from aoti_sched.model.specs import spec_from_metadata
from aoti_sched.model.wrapper_source import writes_to_buffers
from aoti_sched.package import Extracted, PackagedModel, check_platform, find_package
from aoti_sched.package.sources import constant_layouts

if TYPE_CHECKING:
    from aoti_sched.backends.aoti.raw_container import RawContainer

OpenRaw: TypeAlias = "Callable[[Library, LoadRequest, str], RawContainer]"
"""A function that makes the runtime's container; the text is the model's name in errors."""

WrapRaw: TypeAlias = "Callable[[RawContainer, InspectedPackage, str], Container]"
"""A function that makes the container around the runtime's container.

The text is the reason why torch's own runner is needed, or "" where the C ABI suffices.
"""


class InspectedPackage(Inspected, frozen=True, kw_only=True, eq=False):
    """An inspected model of a package, with the model's extracted files."""

    model: PackagedModel
    extracted: Extracted


def inspect_package(
    request: LoadRequest, kind: str, check: Callable[[PackagedModel], None] | None = None
) -> InspectedPackage:
    """Read, check and extract one model of a package.

    Args:
        request: What to load.
        kind: Torch's word for the kind of device that the model must be compiled for.
        check: The device's own checks, called before anything is extracted.

    Raises:
        PackageError: The package is missing, broken, for another platform or for another kind of
            device.
    """
    package = find_package(
        request.path,
        request.model_name,
        sha256=request.sha256,
        contents=request.contents,
        cache_dir=request.cache_dir,
    )
    model = package.model(request.model_name)
    check_platform(model)
    if model.device not in ("", kind):
        raise PlatformMismatchError(
            f"{request.path}: model {model.name!r} was compiled for {model.device}, not for {kind}",
            path=str(request.path),
        )
    if check is not None:
        check(model)
    extracted = package.extract(model, request.cache_dir)
    # A package in memory is not needed any more: its files are in the cache now.
    request = msgspec.structs.replace(request, contents=None)
    own, wrapper = spec_from_metadata(model.metadata), package.wrapper_source(model)
    if writes_to_buffers(own, wrapper):
        # Instances share their buffers, and nothing in the runtime guards them
        # (pytorch/pytorch#122824).
        request = msgspec.structs.replace(request, instances=1)
    return InspectedPackage(
        request=request,
        constant_bytes=model.constant_bytes,
        model=model,
        extracted=extracted,
        own=own,
        metadata=model.metadata,
        wrapper_source=wrapper,
        sha256=package.sha256,
        thread_limit=model.thread_limit,
        fixed_threads=model.fixed_threads,
    )


def open_container(
    inspected: Inspected, device: str, open_raw: OpenRaw, wrap: WrapRaw
) -> Container:
    """Load an inspected model's library and make its container.

    After a failure, nothing stays loaded.

    Args:
        inspected: What `inspect_package` returned.
        device: The device's name, as torch's runtime takes it.
        open_raw: Makes the runtime's container.
        wrap: Makes the container around it.

    Raises:
        LoadError: The library or its weights can't be loaded.
    """
    if not isinstance(inspected, InspectedPackage):
        raise TypeError(
            f"device {device!r}: load() got {type(inspected).__name__}. Pass the result of the "
            "device's own inspect()."
        )
    request, extracted = inspected.request, inspected.extracted
    wrapper = inspected.wrapper_source
    title = f"model {request.name!r}"  # the name that the user gave, not the library's
    library = Library(extracted.library)
    proxy, why_not = None, ""
    if inspected.model.needs_proxy_executor:
        proxy, why_not = open_proxy_executor(title, device, extracted.library)
    raw = open_raw(library, request, title)
    try:
        if request.instances > 1 and writes_to_buffers(
            inspected.own, wrapper, [constant.spec for constant in raw.constants]
        ):
            raw.close()
            request = msgspec.structs.replace(request, instances=1)
            raw = open_raw(library, request, title)
        raw.layouts = constant_layouts(wrapper or "")
        raw.proxy = proxy
        return wrap(raw, msgspec.structs.replace(inspected, request=request), why_not)
    except BaseException:
        raw.close()
        raise
