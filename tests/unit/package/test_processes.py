"""Unpacking by several at once, and by one that is killed in the middle: real threads, real
processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from aoti_sched.errors import PackageError
from aoti_sched.package import cache as package_cache
from aoti_sched.package import open_package
from tests.unit.package.files import elf, write_package

# Says what it extracted and how often it wrote, and waits where it is told: for a line on its input
# before it starts, or in the middle of the library, for ever.
SCRIPT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from aoti_sched.package import cache as package_cache
    from aoti_sched.package import open_package
    from aoti_sched.package.archive import ZipSource

    path, cache, where = sys.argv[1:]
    written = 0
    write, chunks = package_cache._write, ZipSource.chunks

    def counted(*arguments):
        global written
        written += 1
        return write(*arguments)

    def stopping(source, name):
        for chunk in chunks(source, name):
            if name.endswith(".so"):
                yield chunk[:10]
                print("in the middle", flush=True)
                sys.stdin.read()
            yield chunk

    package_cache._write = counted
    if where == "middle":
        ZipSource.chunks = stopping
    package = open_package(path)
    print("ready", flush=True)
    sys.stdin.readline()
    directory = package.extract(cache_dir=Path(cache)).directory
    print(json.dumps([str(directory), written]), flush=True)
    """
)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_package(tmp_path / "p.pt2")


@pytest.fixture
def start(path, tmp_path):
    """Start a process that is ready to extract; all are gone at the end."""
    processes = []

    def begin(where: str = "start") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "cache"), where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def kill_in_the_middle(process: subprocess.Popen[str]) -> None:
    go(process)
    assert process.stdout.readline() == "in the middle\n"
    process.send_signal(signal.SIGKILL)
    process.wait()


def unpacked(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*/*") if path.parent.name not in ("known", "users"))


def test_processes_at_once_share_one_directory_that_one_of_them_wrote(start, tmp_path):
    processes = [start() for _ in range(4)]
    for process in processes:
        go(process)
    results = [json.loads(process.stdout.readline()) for process in processes]
    (directory,) = {Path(directory) for directory, _ in results}
    assert sum(written for _, written in results) == 1
    assert unpacked(tmp_path / "cache") == [directory.parent]


def test_processes_at_once_read_a_copied_cache_and_none_of_them_writes_it_anew(
    start, path, tmp_path
):
    original = open_package(path).extract(cache_dir=tmp_path / "original").directory
    shutil.copytree(tmp_path / "original", tmp_path / "cache")
    processes = [start() for _ in range(4)]
    for process in processes:
        go(process)
    results = [json.loads(process.stdout.readline()) for process in processes]
    copied = tmp_path / "cache" / original.relative_to(tmp_path / "original")
    assert results == [[str(copied), 0]] * 4
    assert unpacked(tmp_path / "cache") == [copied.parent]


def test_threads_at_once_share_one_directory_that_one_of_them_wrote(path, tmp_path, monkeypatch):
    write, written = package_cache._write, []

    def counted(*arguments):
        written.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(package_cache, "_write", counted)
    together = Barrier(8)

    def extract(_: int):
        package = open_package(path)
        together.wait()
        return package.extract(cache_dir=tmp_path / "cache").directory

    with ThreadPoolExecutor(8) as pool:
        (directory,) = set(pool.map(extract, range(8)))
    assert len(written) == 1
    assert unpacked(tmp_path / "cache") == [directory.parent]


def test_a_process_killed_in_the_middle_leaves_half_a_library_that_nobody_takes(
    start, path, tmp_path
):
    kill_in_the_middle(start("middle"))
    (left,) = unpacked(tmp_path / "cache")
    assert left.name.startswith(".new-")
    assert (left / "files" / "abc.wrapper.so").stat().st_size < len(elf())

    extracted = open_package(path).extract(cache_dir=tmp_path / "cache")
    assert extracted.library.read_bytes() == elf()
    assert unpacked(tmp_path / "cache") == [extracted.directory.parent]


def test_whoever_waits_for_a_process_that_is_killed_takes_over(start, tmp_path):
    holder, waiter = start("middle"), start()
    go(holder)
    assert holder.stdout.readline() == "in the middle\n"
    go(waiter)
    os.kill(holder.pid, signal.SIGKILL)
    directory, written = json.loads(waiter.stdout.readline())
    assert written == 1
    assert unpacked(tmp_path / "cache") == [Path(directory).parent]


def test_a_lock_file_that_nobody_holds_does_not_stop_anyone(path, tmp_path):
    package = open_package(path)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    (cache / f"{package.sha256}-model.lock").write_text("4194304")
    assert package.extract(cache_dir=cache).library.read_bytes() == elf()


def test_waiting_for_a_process_that_is_stuck_ends_with_its_lock_named(
    start, path, tmp_path, monkeypatch
):
    holder = start("middle")
    go(holder)
    assert holder.stdout.readline() == "in the middle\n"
    monkeypatch.setattr(package_cache, "_LOCK_TIMEOUT", 0.0)
    with pytest.raises(
        PackageError, match=r"another process to unpack the same package.*delete .*-model\.lock"
    ):
        open_package(path).extract(cache_dir=tmp_path / "cache")
