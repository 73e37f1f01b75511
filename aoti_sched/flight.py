"""Flight records: the last facts of every device, in a file that can be sent and replayed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from aoti_sched.errors import ReplayError
from aoti_sched.queue.facts import Record
from aoti_sched.queue.recorded import RecordedQueue
from aoti_sched.version import VERSION as RELEASE
from aoti_sched.whole_file import whole_file

VERSION = 1
"""The version of the file. Another number is written when old files can't be read any more."""


class RecordedFact(msgspec.Struct, frozen=True):
    """A fact as plain values.

    Attributes:
        fact: The name of the queue's method.
        at: When; None for a fact that takes no time.
        values: What the fact was about, by the names of `queue.recorded.VALUES`. A job is its
            number at that time; -1 for one that was not submitted before. A number that is not
            finite is text.
    """

    fact: str
    at: float | None
    values: dict[str, Any]


class SavedObject(msgspec.Struct, frozen=True):
    """An object of a queue's state.

    Attributes:
        kind: The name of its class; "queue" for the first.
        values: Its values by name; of a container, the items; of a dict, keys and values in turn.
    """

    kind: str
    values: dict[str, Any] | list[Any]


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The last facts of one device, and how its queue was made.

    Attributes:
        device: The device's name.
        lanes: The number of lanes before the first runner was added.
        cores: The number of cores.
        bounds: The most that may be queued over all runners.
        inline_budget: Seconds of inline runs in one turn of the loop.
        policy: The device's choices among the rules.
        memory_limit: Bytes that the models may take; None for no limit.
        evicts: Whether idle runners are evicted when others need their memory.
        facts: The facts, in order.
        dropped: How many earlier facts are not kept.
        state: The state of the queue before the first fact, as `queue.snapshot` has it. A record
            that has neither all facts nor a state can't be replayed.
        counters: The totals of the runners by name, after the last fact. A replay compares them.
        error: The text of the error that the last fact raised, where the record was made for it.
    """

    device: str
    lanes: int
    cores: int
    bounds: dict[str, int | None]
    inline_budget: float
    policy: dict[str, Any]
    memory_limit: int | None
    evicts: bool
    facts: list[RecordedFact]
    dropped: int
    counters: dict[str, dict[str, float]]
    error: str = ""
    state: list[SavedObject] | None = None


class FlightRecord:
    """The last facts of every device of a scheduler. Made by `Scheduler.flight_record`.

    The record has names of models and devices, sizes, times and errors. It has no inputs, no
    outputs, no weights, and no names of tenants.

    Args:
        records: What each device has kept, by name.

    Attributes:
        version: The version of the format.
        release: The release of aoti_sched that made the record.
    """

    def __init__(self, records: Mapping[str, Record]) -> None:
        self._records = records
        self.version = VERSION
        self.release = RELEASE

    @cached_property
    def devices(self) -> dict[str, DeviceRecord]:
        """The records of the devices, by name. The facts are read when this is first used."""
        return {name: device_record(record) for name, record in self._records.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a JSON file: whole, or not at all.

        Raises:
            OSError: The file can't be written.
        """
        content = _File(version=self.version, release=self.release, devices=self.devices)
        with whole_file(path) as beside:
            beside.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FlightRecord:
        """Read a record from a file that `save` has written.

        Raises:
            OSError: The file can't be read.
            ReplayError: The file is no such record, or of another version.
        """
        content = Path(path).read_bytes()
        try:
            version = msgspec.json.decode(content, type=_Version).version
            if version != VERSION:
                raise ReplayError(
                    f"{os.fspath(path)}: the record has version {version}, and this release reads "
                    f"version {VERSION}. Replay it with the release that made it"
                )
            read = msgspec.json.decode(content, type=_File)
        except (msgspec.MsgspecError, RecursionError) as error:
            what = f"this is no flight record: {error}"
            if _is_timeline(content):
                what = (
                    "this is a timeline, which can't be replayed. scheduler.flight_record().save "
                    "writes a flight record"
                )
            raise ReplayError(f"{os.fspath(path)}: {what}") from None
        record = cls({})
        record.release = read.release
        record.devices = read.devices
        return record


class _Version(msgspec.Struct):
    version: int


class _File(msgspec.Struct, kw_only=True):
    version: int
    release: str
    devices: dict[str, DeviceRecord]


class _Timeline(msgspec.Struct):
    events: msgspec.Raw = msgspec.field(name="traceEvents")


def _is_timeline(content: bytes) -> bool:
    try:
        msgspec.json.decode(content, type=_Timeline)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def device_record(record: Record) -> DeviceRecord:
    """Read what a device has kept."""
    return msgspec.convert(record.plain(), DeviceRecord)


def flight_record_of(queues: Iterable[RecordedQueue]) -> FlightRecord:
    """Return the record of these devices, whose facts are read later."""
    return FlightRecord({queue.name: queue.record() for queue in queues})
