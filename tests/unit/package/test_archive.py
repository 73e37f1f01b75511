"""Files that lie, break and change: what `archive` refuses, and that it names the culprit."""

import hashlib
import os
import random
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from aoti_sched.errors import (
    PackageError,
    PackageFormatError,
    PackageHashError,
    PackageNotFoundError,
)
from aoti_sched.package import open_package
from aoti_sched.package.archive import ReadLimits
from tests.unit.package.files import DEFLATED, Member, elf, model_members, write_package, zipped

MEBI = 1 << 20


def hostile(tmp_path: Path, *members: Member) -> Path:
    return write_package(tmp_path / "p.pt2", *members)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../evil.so",
        "p/../../evil.so",
        "/etc/evil.so",
        "C:/evil.so",
        "c:evil.so",
        "p\\..\\..\\evil.so",
        "\\\\host\\share\\evil.so",
        "p//evil.so",
        "./evil.so",
        "p/evil.so\0.txt",
        "..",
    ],
)
def test_a_member_that_would_leave_the_directory_is_named_and_refused(tmp_path, name):
    with pytest.raises(PackageFormatError, match="outside the directory") as caught:
        open_package(hostile(tmp_path, Member(name)))
    assert "evil.so" in str(caught.value) or "'..'" in str(caught.value)
    assert caught.value.path == str(tmp_path / "p.pt2")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_member_that_is_no_plain_file_is_refused(tmp_path, kind):
    with pytest.raises(PackageFormatError, match=r"'p/link' is a link or a device"):
        open_package(hostile(tmp_path, Member("p/link", b"/etc/passwd", mode=kind | 0o777)))


def test_a_directory_as_a_member_is_harmless(tmp_path):
    path = hostile(tmp_path, Member("p/extra/", mode=stat.S_IFDIR | 0o755))
    assert open_package(path).models == ("model",)


@pytest.mark.parametrize(
    "again",
    ["p/data/aotinductor/model/abc.wrapper.so", "p\\data/aotinductor/model\\abc.wrapper.so"],
)
def test_a_member_that_appears_twice_is_refused(tmp_path, again):
    with pytest.raises(PackageFormatError, match=r"abc\.wrapper\.so' appears twice"):
        open_package(hostile(tmp_path, Member(again, elf(b"other"))))


def test_a_member_called_differently_in_its_own_header_is_refused(tmp_path):
    path = with_library(tmp_path, local_name=b"p/data/aotinductor/model/xyz.wrapper.so")
    refuse_extraction(path, "is called differently in the directory and in its own header")


# --- sizes ----------------------------------------------------------------------------------------


def test_a_compressed_member_that_claims_to_grow_absurdly_is_refused(tmp_path):
    with pytest.raises(
        PackageFormatError, match=r"'p/zeros' claims to grow from \d+ to 4194304 bytes"
    ):
        open_package(hostile(tmp_path, Member("p/zeros", bytes(4 * MEBI), DEFLATED)))


def test_a_stored_member_must_store_as_much_as_it_claims(tmp_path):
    with pytest.raises(PackageFormatError, match="'p/x' claims 1000 bytes but stores 3"):
        open_package(hostile(tmp_path, Member("p/x", b"abc", size=1000)))


def test_the_members_together_may_claim_only_so_much(tmp_path):
    with pytest.raises(PackageFormatError, match=r"claims \d+ bytes unpacked, more than 100"):
        open_package(hostile(tmp_path), limits=ReadLimits(total=100))


def test_there_may_be_only_so_many_members(tmp_path):
    with pytest.raises(PackageFormatError, match="has 4 members, more than 3"):
        open_package(hostile(tmp_path), limits=ReadLimits(members=3))


def test_a_directory_too_large_for_memory_is_not_read(tmp_path):
    with pytest.raises(PackageFormatError, match=r"has a directory of \d+ bytes, more than 50"):
        open_package(hostile(tmp_path), limits=ReadLimits(directory=50))


def test_members_that_overlap_are_refused(tmp_path):
    with pytest.raises(PackageFormatError, match="overlaps another member"):
        open_package(hostile(tmp_path, Member("p/again", elf(), offset=0)))


def test_a_member_that_reaches_beyond_the_end_of_the_file_is_refused(tmp_path):
    with pytest.raises(PackageFormatError, match="'p/x' reaches beyond the end of the file"):
        open_package(hostile(tmp_path, Member("p/x", b"abc", packed=5000, size=5000)))


def test_a_member_that_begins_before_the_file_is_refused(tmp_path):
    path = hostile(tmp_path)
    content = bytearray(path.read_bytes())
    content[-6:-2] = (len(content)).to_bytes(
        4, "little"
    )  # the directory claims to begin later than it does
    path.write_bytes(content)
    with pytest.raises(PackageFormatError, match="begins before the file does"):
        open_package(path)


def test_metadata_too_large_to_be_metadata_is_not_read(tmp_path):
    with pytest.raises(PackageFormatError, match=r"abc\.wrapper_metadata\.json' claims \d+ bytes"):
        open_package(hostile(tmp_path), limits=ReadLimits(json=10)).model()


def test_a_source_too_large_to_be_one_is_not_read(tmp_path):
    with pytest.raises(
        PackageFormatError, match=r"\.cpp' claims \d+ bytes where at most 10 are plausible"
    ):
        open_package(hostile(tmp_path), limits=ReadLimits(source=10)).model()


# --- content --------------------------------------------------------------------------------------


def with_library(tmp_path: Path, **fields: object) -> Path:
    members = model_members()
    for name, value in fields.items():
        setattr(members[3], name, value)
    path = tmp_path / "p.pt2"
    path.write_bytes(zipped(members))
    return path


def refuse_extraction(path: Path, match: str) -> None:
    package = open_package(path)
    cache = path.parent / "cache"
    with pytest.raises(PackageFormatError, match=rf"abc\.wrapper\.so' {match}"):
        package.extract(cache_dir=cache)
    assert not [found for found in cache.iterdir() if found.suffix != ".lock"]


@pytest.mark.parametrize("method", [0, DEFLATED])
def test_a_wrong_checksum_is_found(tmp_path, method):
    refuse_extraction(
        with_library(tmp_path, crc=12345, method=method),
        "is damaged: 68 of 68 bytes, or a wrong checksum",
    )


def test_more_bytes_than_declared_are_found(tmp_path):
    data = elf(os.urandom(3 * MEBI))
    refuse_extraction(
        with_library(tmp_path, data=data, method=DEFLATED, size=MEBI),
        "holds more than the 1048576 bytes it declares",
    )


def test_more_bytes_than_declared_are_found_when_they_are_few(tmp_path):
    refuse_extraction(
        with_library(tmp_path, method=DEFLATED, size=67), "holds more than the 67 bytes it declares"
    )


def test_fewer_bytes_than_declared_are_found(tmp_path):
    refuse_extraction(
        with_library(tmp_path, method=DEFLATED, size=69), "is damaged: 68 of 69 bytes"
    )


def test_bytes_behind_the_compressed_data_are_found(tmp_path):
    refuse_extraction(
        with_library(tmp_path, method=DEFLATED, tail=b"hidden"),
        "is damaged: its compressed data ends",
    )


def test_compressed_data_that_is_none_is_found(tmp_path):
    path = with_library(tmp_path, method=DEFLATED)
    content = path.read_bytes()
    start = content.index(b"abc.wrapper.so") + len(b"abc.wrapper.so")
    path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
    refuse_extraction(path, "is damaged: Error")


def test_a_member_without_a_header_is_found(tmp_path):
    path = with_library(tmp_path)
    content = path.read_bytes()
    start = content.index(b"p/data/aotinductor/model/abc.wrapper.so") - 30
    path.write_bytes(content[:start] + b"????" + content[start + 4 :])
    refuse_extraction(path, "has no header where the directory puts it")


def test_an_encrypted_member_is_refused(tmp_path):
    with pytest.raises(PackageFormatError, match="'p/secret' is encrypted"):
        open_package(hostile(tmp_path, Member("p/secret", flags=0x801)))


def test_an_unusual_compression_is_refused(tmp_path):
    with pytest.raises(PackageFormatError, match="'p/x' uses compression method 12"):
        open_package(hostile(tmp_path, Member("p/x", method=12)))


def test_a_compressed_package_unpacks_to_the_same_bytes(tmp_path):
    library = elf(random.Random(0).randbytes(2 * MEBI) + b"same " * MEBI)
    path = with_library(tmp_path, data=library, method=DEFLATED)
    assert open_package(path).extract(cache_dir=tmp_path / "cache").library.read_bytes() == library


def test_output_that_is_left_when_the_compressed_bytes_are_used_up_is_not_lost(tmp_path):
    # The last match spans the end of a block, so the inflater holds on to its rest.
    library = elf(random.Random(0).randbytes(MEBI - 164) + bytes(300))
    path = with_library(tmp_path, data=library, method=DEFLATED)
    assert open_package(path).extract(cache_dir=tmp_path / "cache").library.read_bytes() == library


def test_a_library_of_many_blocks_unpacks_to_the_same_bytes(tmp_path):
    library = elf(random.Random(0).randbytes(5 * MEBI + 17))
    path = with_library(tmp_path, data=library)
    assert open_package(path).extract(cache_dir=tmp_path / "cache").library.read_bytes() == library


# --- no package at all ----------------------------------------------------------------------------


def test_every_prefix_of_a_package_is_refused(tmp_path):
    content = zipped(model_members())
    path = tmp_path / "p.pt2"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(PackageFormatError):
            open_package(path)


def test_a_truncated_package_is_called_truncated(tmp_path):
    path = tmp_path / "p.pt2"
    path.write_bytes(zipped(model_members())[:300])
    with pytest.raises(PackageFormatError, match=r"p\.pt2 is truncated: .* after 300 bytes"):
        open_package(path)


def test_an_empty_file_is_called_empty(tmp_path):
    path = tmp_path / "p.pt2"
    path.touch()
    with pytest.raises(PackageFormatError, match=r"p\.pt2 is empty"):
        open_package(path)


def test_a_file_that_is_no_zip_is_named(tmp_path):
    path = tmp_path / "p.pt2"
    path.write_text("weights = 3")
    with pytest.raises(PackageFormatError, match=r"p\.pt2 is neither a zip nor a shared library"):
        open_package(path)


def test_a_directory_is_not_a_package(tmp_path):
    with pytest.raises(PackageFormatError, match="is a directory or a device"):
        open_package(tmp_path)


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "p.pt2")
    with pytest.raises(PackageFormatError, match="is a directory or a device"):
        open_package(tmp_path / "p.pt2")


@pytest.mark.parametrize("name", ["absent.pt2", "file/absent.pt2"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(PackageNotFoundError, match=r"absent\.pt2") as caught:
        open_package(tmp_path / name)
    assert isinstance(caught.value, FileNotFoundError)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = hostile(tmp_path)
    real_open = os.open

    def forbidding_open(name, *args, **kwargs):
        if os.fspath(name) == str(path):
            raise PermissionError(13, "Permission denied")
        return real_open(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbidding_open)
    with pytest.raises(PackageError, match=r"Cannot read .*p\.pt2: Permission denied"):
        open_package(path)


@given(data=strategies.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_anywhere_gives_a_package_error_or_nothing_worse_than_other_bytes(tmp_path, data):
    content = bytearray(zipped([*model_members(), Member("p/x", b"some text " * 20, DEFLATED)]))
    for _ in range(data.draw(strategies.integers(1, 4))):
        content[data.draw(strategies.integers(0, len(content) - 1))] = data.draw(
            strategies.integers(0, 255)
        )
    path = tmp_path / "p.pt2"
    path.write_bytes(content)
    with suppress(PackageError):
        package = open_package(path)
        for name in package.models:
            package.model(name)
            directory = package.extract(name, tmp_path / "cache").directory
            assert directory.is_relative_to(tmp_path / "cache")


# --- hashes ---------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_expected_hash_opens_the_package_in_either_case(tmp_path):
    path = hostile(tmp_path)
    for expected in (digest(path), digest(path).upper()):
        assert open_package(path, sha256=expected).sha256 == digest(path)


def test_another_hash_names_both(tmp_path):
    path = hostile(tmp_path)
    with pytest.raises(PackageHashError, match=f"expected sha256 {'0' * 64}, got {digest(path)}"):
        open_package(path, sha256="0" * 64)


def test_a_wrong_hash_is_found_before_anything_is_parsed(tmp_path):
    path = tmp_path / "p.pt2"
    path.write_text("no package, so parsing it would be another error")
    with pytest.raises(PackageHashError):
        open_package(path, sha256="0" * 64)


@pytest.mark.parametrize("malformed", ["", "abc", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n"])
def test_a_malformed_hash_is_an_error(tmp_path, malformed):
    with pytest.raises(PackageHashError, match="expected 64 hexadecimal digits"):
        open_package(hostile(tmp_path), sha256=malformed)


def rewrite(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def replace(path: Path, content: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(content)
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_file_that_changes_between_hash_and_extraction_is_refused(tmp_path, change):
    path = write_package(tmp_path / "p.pt2", files={"abc.wrapper.so": elf(b"good")})
    package = open_package(path, sha256=digest(path))
    change(path, path.read_bytes().replace(b"good", b"evil"))
    with pytest.raises(PackageHashError, match=r"p\.pt2 changed after it was opened"):
        package.extract(cache_dir=tmp_path / "cache")
    assert not [found for found in (tmp_path / "cache").iterdir() if found.suffix != ".lock"]


def test_a_file_that_changes_between_hash_and_description_is_refused(tmp_path):
    path = write_package(tmp_path / "p.pt2")
    package = open_package(path, sha256=digest(path))
    rewrite(path, path.read_bytes().replace(b'"cpu"', b'"xpu"'))
    with pytest.raises(PackageHashError, match="changed after it was opened"):
        package.model()


def test_a_file_that_shrinks_after_it_was_hashed_is_refused(tmp_path):
    path = write_package(tmp_path / "p.pt2")
    package = open_package(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PackageHashError, match="changed after it was opened"):
        package.extract(cache_dir=tmp_path / "cache")


def test_a_file_that_is_gone_after_it_was_hashed_is_missing(tmp_path):
    path = write_package(tmp_path / "p.pt2")
    package = open_package(path)
    path.unlink()
    with pytest.raises(PackageNotFoundError, match=r"p\.pt2"):
        package.extract(cache_dir=tmp_path / "cache")


def test_a_file_that_only_grows_is_read_as_it_was(tmp_path):
    path = write_package(tmp_path / "p.pt2")
    package = open_package(path)
    with path.open("ab") as file:
        file.write(b"more")
    assert package.extract(cache_dir=tmp_path / "cache").library.read_bytes() == elf()


def test_a_package_holds_no_file_open(tmp_path):
    # This process keeps one file of its own open in each cache.
    open_package(write_package(tmp_path / "other.pt2")).extract(cache_dir=tmp_path / "cache")
    before = len(list(Path("/proc/self/fd").iterdir()))
    package = open_package(hostile(tmp_path))
    package.model()
    package.extract(cache_dir=tmp_path / "cache")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
