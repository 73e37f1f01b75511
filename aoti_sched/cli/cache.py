"""`aoti-sched cache`: lists and prunes the extracted packages."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import Report, out, print_json, print_table
from aoti_sched.cli.units import seconds, size, size_text, time_text


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One extracted model.

    Attributes:
        name: The entry's folder: a hash of the files, and the model's name.
        bytes: The size of the files.
        last_use: When a process used the entry last, in ISO 8601.
        in_use: Whether a running process uses the entry.
        packages: The packages that the model was extracted from, as far as they are known.
    """

    name: str
    bytes: int
    last_use: str
    in_use: bool
    packages: tuple[str, ...]


class CacheReport(Report, frozen=True, kw_only=True):
    """What `cache ls --json` prints."""

    path: str
    bytes: int
    entries: tuple[CacheEntry, ...]


class PruneReport(Report, frozen=True, kw_only=True):
    """What `cache prune --json` prints.

    Attributes:
        path: The cache.
        deleted: Entries that were deleted.
        deleted_bytes: Their bytes.
        left_bytes: Bytes of the entries that are left.
    """

    path: str
    deleted: int
    deleted_bytes: int
    left_bytes: int


def ls_command(
    *,
    cache_dir: Path | None = None,
    json: Flag = False,
) -> None:
    """List the packages that are extracted, with their size and age.

    Args:
        cache_dir: The cache; by default that of the user, or $AOTI_SCHED_CACHE.
        json: Print JSON.
    """
    report = read_cache(cache_dir)
    if json:
        print_json(report)
        return
    console = out()
    now = time.time()
    rows = [
        (
            size_text(entry.bytes),
            time_text(max(0.0, now - datetime.fromisoformat(entry.last_use).timestamp())),
            "yes" if entry.in_use else "no",
            entry.name,
            ", ".join(entry.packages),
        )
        for entry in report.entries
    ]
    if rows:
        print_table(console, ("size", "age", "in use", "entry", "package"), rows)
    count = len(rows)
    console.print(
        f"{report.path}: {count} {'entry' if count == 1 else 'entries'}, {size_text(report.bytes)}"
    )


def prune_command(
    *,
    limit: str | None = None,
    age: str | None = None,
    everything: Annotated[Flag, Parameter(name="--all")] = False,
    cache_dir: Path | None = None,
    json: Flag = False,
) -> None:
    """Delete extracted packages that no process uses.

    A package is extracted again when it is loaded the next time.

    Args:
        limit: Bytes that may stay, such as "2GiB". The least recently used entries go first.
        age: Delete entries that were not used for this time, such as "30d".
        everything: Delete all entries.
        cache_dir: The cache; by default that of the user, or $AOTI_SCHED_CACHE.
        json: Print JSON.
    """
    from aoti_sched.package.prune import prune

    if not everything and limit is None and age is None:
        raise UsageError("cache prune: nothing says what to delete. Give --limit, --age or --all.")
    folder = _folder(cache_dir)
    most = 0 if everything else None if limit is None else size(limit, "--limit")
    oldest = None if age is None else seconds(age, "--age")
    if folder.is_dir():
        done = prune(folder, limit=most, age=oldest)
        report = PruneReport(
            path=str(folder),
            deleted=done.entries,
            deleted_bytes=done.bytes,
            left_bytes=done.left_bytes,
        )
    else:
        report = PruneReport(path=str(folder), deleted=0, deleted_bytes=0, left_bytes=0)
    if json:
        print_json(report)
        return
    count = f"{report.deleted} {'entry' if report.deleted == 1 else 'entries'}"
    out().print(
        f"{report.path}: deleted {count}, {size_text(report.deleted_bytes)}; "
        f"{size_text(report.left_bytes)} left"
    )


def read_cache(cache_dir: Path | None = None) -> CacheReport:
    """Return what a cache holds, the entry that was used last first.

    Raises:
        PackageError: The cache can't be trusted.
        OSError: The operating system refuses to read it.
    """
    from aoti_sched.package.cache import entries
    from aoti_sched.package.trust import private_folder
    from aoti_sched.package.usage import in_use

    folder = _folder(cache_dir)
    if not folder.is_dir():  # reading makes no cache
        return CacheReport(path=str(folder), bytes=0, entries=())
    cache = private_folder(folder)
    used, sources = in_use(cache), _sources(cache.path)
    found = []
    for entry in entries(cache):
        try:
            last = entry.stat().st_mtime
            files = [file.lstat().st_size for file in entry.rglob("*") if not file.is_dir()]
        except FileNotFoundError:
            continue  # another process deletes it
        found.append(
            CacheEntry(
                name=entry.name,
                bytes=sum(files),
                last_use=datetime.fromtimestamp(last, timezone.utc).isoformat(timespec="seconds"),
                in_use=entry.name in used,
                packages=tuple(sorted(sources.get(entry.name, ()))),
            )
        )
    found.sort(key=lambda entry: entry.last_use, reverse=True)
    return CacheReport(
        path=str(folder), bytes=sum(entry.bytes for entry in found), entries=tuple(found)
    )


def _folder(cache_dir: Path | None) -> Path:
    from aoti_sched.package.cache import default_cache_dir

    return cache_dir.expanduser() if cache_dir is not None else default_cache_dir()


def _sources(cache: Path) -> dict[str, set[str]]:
    """Return the packages of each entry, as the descriptions of known packages state them."""
    from aoti_sched.package.known import FOLDER, Description

    found: dict[str, set[str]] = {}
    for path in (cache / FOLDER).glob("*.json"):
        try:
            description = msgspec.json.decode(path.read_bytes(), type=Description)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
        for model in description.models.values():
            found.setdefault(model.files.key, set()).add(description.path)
    return found
