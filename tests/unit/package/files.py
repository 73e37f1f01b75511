"""Packages made by hand: honest ones in one call, and zips that lie about every field.

Nothing here is loaded or run, so a "library" is an ELF header and some bytes.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STORED, DEFLATED = 0, 8


def elf(payload: bytes = b"code", machine: int = 62, table: int = 0) -> bytes:
    """A 64-bit ELF header (machine 62 is x86-64) whose section table is at `table`, and a
    payload.
    """
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, table, 0, 64, 0, 0, 64, 1 if table else 0, 0
    )
    return header + payload


def wrapper(constants: int = 1, include_weights: str = "true") -> str:
    return (
        "AOTInductorModel::AOTInductorModel(std::shared_ptr<ConstantMap> constants_map)\n"
        f"    : AOTInductorModelBase(1,\n  2,\n  {constants},\n  device_str,\n  "
        f"std::move(cubin_dir),\n"
        f"  {include_weights}) {{\n"
    )


def metadata(**more: str) -> str:
    return json.dumps({"AOTI_DEVICE_KEY": "cpu", **more})


@dataclass
class Member:
    """A zip member; what is None is filled in honestly."""

    name: str | bytes
    data: bytes = b""
    method: int = STORED
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    flags: int = 0x800
    mode: int = 0
    offset: int | None = None
    local_name: bytes | None = None
    tail: bytes = b""


def zipped(members: Sequence[Member]) -> bytes:
    body = b""
    directory = b""
    for member in members:
        name = member.name.encode() if isinstance(member.name, str) else member.name
        data = member.data
        if member.method == DEFLATED:
            deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
            data = deflater.compress(data) + deflater.flush()
        data += member.tail
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        packed = len(data) if member.packed is None else member.packed
        size = len(member.data) if member.size is None else member.size
        offset = len(body) if member.offset is None else member.offset
        local_name = name if member.local_name is None else member.local_name
        fields = struct.pack("<HHHHHLLL", 20, member.flags, member.method, 0, 33, crc, packed, size)
        body += b"PK\x03\x04" + fields + struct.pack("<HH", len(local_name), 0) + local_name + data
        directory += b"PK\x01\x02" + struct.pack("<H", (3 << 8) | 20) + fields
        directory += (
            struct.pack("<HHHHHLL", len(name), 0, 0, 0, 0, member.mode << 16, offset) + name
        )
    count = len(members)
    end = struct.pack("<HHHHLLH", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def model_members(
    name: str = "model",
    root: str = "p/",
    files: Mapping[str, str | bytes] | None = None,
    stem: str = "abc.wrapper",
) -> list[Member]:
    """One model as torch lays it out; `files` adds to it or replaces."""
    content: dict[str, str | bytes] = {
        f"{stem}.cpp": wrapper(),
        "def.kernel.cpp": 'extern "C" void kernel() {}\n',
        f"{stem}_metadata.json": metadata(),
        f"{stem}.so": elf(),
        **(files or {}),
    }
    return [
        Member(
            f"{root}data/aotinductor/{name}/{file}",
            text.encode() if isinstance(text, str) else text,
        )
        for file, text in content.items()
    ]


def write_package(path: Path, *more: Member, **kwargs: object) -> Path:
    path.write_bytes(zipped([*model_members(**kwargs), *more]))
    return path
