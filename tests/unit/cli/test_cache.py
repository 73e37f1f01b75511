"""`cache ls` and `cache prune`, beside packages that are really extracted."""

import os
import re

import pytest

from aoti_sched.package import open_package
from tests.unit.cli.support import json_of, refused, run
from tests.unit.package.files import elf, write_package


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def extracted(tmp_path, cache):
    """Two packages in the cache, the second not used for ten days."""
    names = []
    for name in ("new", "old"):
        path = tmp_path / f"{name}.pt2"
        write_package(path, files={"abc.wrapper.so": elf(name.encode())})
        os.utime(path, (1e9, 1e9))
        names.append(open_package(path).extract(cache_dir=cache).directory)
    entry = names[1]
    while entry.parent != cache.resolve():
        entry = entry.parent
    old = entry.stat().st_mtime - 10 * 86400
    os.utime(entry, (old, old))
    return cache


def test_an_empty_cache_is_listed_and_not_made(cache):
    report = json_of("cache", "ls", "--cache-dir", cache)
    assert report == {"version": 1, "path": str(cache), "bytes": 0, "entries": []}
    assert not cache.exists()


def test_entries_are_listed_with_size_and_age(extracted):
    report = json_of("cache", "ls", "--cache-dir", extracted)
    assert len(report["entries"]) == 2
    assert report["bytes"] == sum(entry["bytes"] for entry in report["entries"]) > 0
    last = [entry["last_use"] for entry in report["entries"]]
    assert last == sorted(last, reverse=True)
    text = run("cache", "ls", "--cache-dir", extracted).stdout
    assert re.search(r"\b10 d\b", text)
    assert "2 entries" in text
    assert not any(line != line.rstrip() and len(line) > 200 for line in text.splitlines())


def test_an_entry_in_use_is_shown_and_kept(extracted):
    # This process has extracted the entries, so it uses them.
    assert all(e["in_use"] for e in json_of("cache", "ls", "--cache-dir", extracted)["entries"])
    report = json_of("cache", "prune", "--all", "--cache-dir", extracted)
    assert (report["deleted"], report["deleted_bytes"]) == (0, 0)


def test_entries_are_pruned_by_age_and_by_size(extracted):
    for file in (extracted / "users").iterdir():
        file.unlink()  # as if the process had ended
    before = json_of("cache", "ls", "--cache-dir", extracted)
    report = json_of("cache", "prune", "--age", "9d", "--cache-dir", extracted)
    assert report["deleted"] == 1
    assert report["left_bytes"] == before["bytes"] - report["deleted_bytes"]
    assert json_of("cache", "prune", "--limit", "1GiB", "--cache-dir", extracted)["deleted"] == 0
    done = run("cache", "prune", "--all", "--cache-dir", extracted)
    assert (done.returncode, done.stderr) == (0, "")
    assert "deleted 1 entry" in done.stdout
    assert json_of("cache", "ls", "--cache-dir", extracted)["entries"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give --limit, --age or --all."),
        (("--age", "3 weeks"), "--age: '3 weeks' is no time."),
        (("--limit", "much"), "--limit: 'much' is no size."),
    ],
)
def test_a_wrong_prune_is_refused(cache, arguments, says):
    assert says in refused("cache", "prune", *arguments, "--cache-dir", cache)


def test_a_cache_that_others_can_write_to_is_refused(cache):
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    assert "may be written by others" in refused("cache", "ls", "--cache-dir", cache, code=1)
