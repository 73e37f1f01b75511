"""Flight records: the last facts of every device, in a file that can be sent and replayed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from aoti_sched.errors import ReplayError
from aoti_sched.queue.recorded import DeviceRecord, RecordedQueue
from aoti_sched.version import VERSION as RELEASE

VERSION = 1
"""The version of the file. Another number is written when old files can't be read any more."""


class FlightRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The last facts of every device of a scheduler. Made by `Scheduler.flight_record`.

    The record has names of models and devices, sizes, times and errors. It has no inputs, no
    outputs, no weights, and no names of tenants.

    Attributes:
        version: The version of the format.
        release: The release of aoti_sched that made the record.
        devices: The records of the devices, by name.
    """

    version: int
    release: str
    devices: dict[str, DeviceRecord]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a JSON file.

        Raises:
            OSError: The file can't be written.
        """
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))

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
            return msgspec.json.decode(content, type=cls)
        except msgspec.MsgspecError as error:
            raise ReplayError(f"{os.fspath(path)}: this is no flight record: {error}") from None


class _Version(msgspec.Struct):
    version: int


def flight_record_of(queues: Iterable[RecordedQueue]) -> FlightRecord:
    """Return the record of these devices."""
    devices = {queue.name: queue.record() for queue in queues}
    return FlightRecord(version=VERSION, release=RELEASE, devices=devices)
