"""`aoti-sched inspect`: what a package says of its models. No code of the package is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import Report, out, print_json, print_pairs, print_table, print_title
from aoti_sched.cli.units import size_text
from aoti_sched.model.specs import (
    METADATA_KEY,
    BatchDim,
    LeafSpec,
    LiteralSpec,
    ModelSpec,
    RowEvidence,
    SpecSource,
    TensorSpec,
    spec_from_metadata,
    specs_from_wrapper,
)

if TYPE_CHECKING:
    from rich.console import Console

    from aoti_sched.package import Package, PackagedModel


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a package.

    Attributes:
        name: The model's name.
        spec_source: Where `inputs` come from.
        inputs: The leaves of the arguments, as far as the package states them.
        outputs: The leaves of the results; () where the package does not state them.
        batch: The dimension of the rows; None where the package states none.
        rows: What is known of the independence of rows.
        device: cpu, cuda, xpu or mps; "" where the package does not say.
        platform: As in `sys.platform`.
        machine: As in `platform.machine()`.
        cpu_isa: The instruction sets that the model was compiled for, at least.
        runs_here: Whether this machine fits; its devices are not looked at.
        misfit: Why this machine does not fit; "" where it does.
        torch_version: The torch that compiled the model; "" where the package does not say.
        threads: Intra-op threads of a run; None where the package does not say.
        thread_limit: The most threads that a run can bear; None without a limit.
        weights: Where the weights are.
        constants: The number of constants; None where the package does not say.
        constant_bytes: Bytes of all constants; None where the package does not say.
        frozen: Whether the weights are part of the code; None where the package does not say.
        mutates_buffers: Whether a run writes to the model's buffers; None where that is not known.
        needs_proxy_executor: Whether the model calls operators through torch's proxy executor.
        checked: What a request is checked for.
        unchecked: What a request is not checked for, or is not known before the load.
        metadata: The user's own metadata.
    """

    name: str
    spec_source: SpecSource
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    batch: BatchDim | None
    rows: RowEvidence | None
    device: str
    platform: str
    machine: str
    cpu_isa: tuple[str, ...]
    runs_here: bool
    misfit: str
    torch_version: str
    threads: int | None
    thread_limit: int | None
    weights: str
    constants: int | None
    constant_bytes: int | None
    frozen: bool | None
    mutates_buffers: bool | None
    needs_proxy_executor: bool
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    metadata: dict[str, str]


class PackageReport(Report, frozen=True, kw_only=True):
    """What `inspect --json` prints."""

    path: str
    bytes: int
    sha256: str
    models: tuple[ModelReport, ...]


def inspect_command(
    package: Path,
    /,
    *,
    model: str | None = None,
    json: Flag = False,
) -> None:
    """Show what a package says of its models, without running any code of it.

    Args:
        package: A .pt2 package, or a bare library.
        model: The name of one of its models; by default all are shown.
        json: Print JSON.
    """
    report = read_package(package, model)
    if json:
        print_json(report)
        return
    console = out()
    title = f"{report.path}: {size_text(report.bytes)}, sha256 {report.sha256}"
    print_title(console, title)
    for one in report.models:
        _print_model(console, one)


def read_package(path: Path, model: str | None = None) -> PackageReport:
    """Return what a package says of its models, or of one of them.

    Raises:
        PackageError: The file is missing or broken, or has no such model.
    """
    from aoti_sched.package import open_package

    package = open_package(path)
    names = package.models if model is None else (package.model(model).name,)
    return PackageReport(
        path=str(path),
        bytes=path.stat().st_size,
        sha256=package.sha256,
        models=tuple(_described(package, package.model(name)) for name in names),
    )


def _described(package: Package, model: PackagedModel) -> ModelReport:
    from aoti_sched.errors import PlatformMismatchError
    from aoti_sched.package import check_platform
    from aoti_sched.package.sources import weight_facts

    own = spec_from_metadata(model.metadata)
    wrapper = package.wrapper_source(model)
    inputs: tuple[LeafSpec, ...] = ()
    source = SpecSource.ARITY
    if own is not None:
        inputs, source = own.inputs, SpecSource.PACKAGE
    elif wrapper is not None and (stated := specs_from_wrapper(wrapper)) is not None:
        inputs, source = stated, SpecSource.WRAPPER
    facts = None if wrapper is None else weight_facts(wrapper)
    try:
        check_platform(model)
        misfit = ""
    except PlatformMismatchError as error:
        misfit = str(error)
    return ModelReport(
        name=model.name,
        spec_source=source,
        inputs=inputs,
        outputs=() if own is None else own.outputs,
        batch=None if own is None else own.batch,
        rows=None if own is None else own.rows,
        device=model.device,
        platform=model.platform,
        machine=model.machine,
        cpu_isa=tuple(sorted(model.cpu_isa)),
        runs_here=not misfit,
        misfit=misfit,
        torch_version="" if own is None else own.torch_version,
        threads=model.fixed_threads if own is None else own.threads,
        thread_limit=model.thread_limit,
        weights=model.weights.value,
        constants=None if facts is None else facts.constants,
        constant_bytes=None if facts is None else facts.bytes,
        frozen=None if own is None else own.frozen,
        mutates_buffers=None if own is None else own.mutates_buffers,
        needs_proxy_executor=model.needs_proxy_executor,
        checked=_checked(source),
        unchecked=tuple(_unchecked(source, own, model)),
        metadata={
            key: value
            for key, value in model.metadata.items()
            if key != METADATA_KEY and not key.startswith("AOTI_")
        },
    )


def _checked(source: SpecSource) -> tuple[str, ...]:
    if source is SpecSource.PACKAGE:
        return ("structure of the arguments", "dtype", "sizes and ranges", "memory layout")
    if source is SpecSource.WRAPPER:
        return ("number of tensors", "dtype", "sizes and ranges", "memory layout")
    return ("number of tensors",)


def _unchecked(source: SpecSource, own: ModelSpec | None, model: PackagedModel) -> list[str]:
    found = []
    if source is SpecSource.ARITY:
        found.append("dtypes and sizes: the package does not state them; declare load(inputs=)")
    if source is SpecSource.WRAPPER:
        found.append("least sizes: found at load, by running the model")
    if own is None or own.rows is None:
        found.append("whether rows are independent: found at load with batching, by running")
    if own is not None and own.threads > 1:
        found.append("errors inside kernels of several threads: they end the process")
    if model.weights.value == "absent":
        found.append("the weights: the package has none; give load(weights=)")
    found.append("values: an index out of range is an error of the run")
    return found


def _print_model(console: Console, model: ModelReport) -> None:
    console.print()
    print_title(console, f"model {model.name}")
    built = " ".join(filter(None, (model.platform, model.machine, *model.cpu_isa)))
    limit = "" if model.thread_limit is None else f", at most {model.thread_limit}"
    bytes_ = "" if model.constant_bytes is None else f", {size_text(model.constant_bytes)}"
    constants = "unknown" if model.constants is None else f"{model.constants}{bytes_}"
    weights = model.weights.replace("_", " ")
    print_pairs(
        console,
        [
            ("device", model.device),
            ("compiled for", built),
            ("runs here", "yes" if model.runs_here else f"no: {model.misfit}"),
            ("torch", model.torch_version),
            ("threads", "" if model.threads is None else f"{model.threads}{limit}"),
            ("constants", constants),
            ("weights", f"{weights}{', frozen: no update can change them' * bool(model.frozen)}"),
            ("buffers", "a run writes to them" if model.mutates_buffers else ""),
            ("operators", "some run through torch" if model.needs_proxy_executor else ""),
            ("batch", _batch(model)),
            ("rows", "" if model.rows is None else model.rows.reason),
            ("specs from", model.spec_source.value),
            ("checked", ", ".join(model.checked)),
            *(
                ("not checked" if not index else "", text)
                for index, text in enumerate(model.unchecked)
            ),
            *((f"metadata {key}", value) for key, value in model.metadata.items()),
        ],
    )
    for title, leaves in (("inputs", model.inputs), ("outputs", model.outputs)):
        if leaves:
            console.print()
            print_table(
                console,
                (f"  {title}", "type"),
                [(f"  {leaf.name}", kind_text(leaf)) for leaf in leaves],
            )


def _batch(model: ModelReport) -> str:
    if model.batch is None:
        return "" if model.spec_source is not SpecSource.PACKAGE else "none"
    most = "any number of" if model.batch.max is None else f"at most {model.batch.max}"
    return f"dimension {model.batch.dim}, {most} rows"


def kind_text(leaf: LeafSpec) -> str:
    """Return what a leaf is: "float32[batch:0..64, 16]", "always 3", "integer"."""
    if isinstance(leaf, TensorSpec):
        return str(leaf)
    if isinstance(leaf, LiteralSpec):
        return f"always {leaf.value!r}"
    return type(leaf).__name__.removesuffix("Spec").lower()
