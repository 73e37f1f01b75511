"""The C++ alone, under ThreadSanitizer and AddressSanitizer: a seeded stress of submits, errors
and closes.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.native.library import C_SOURCES, HERE, NATIVE, compile_once

SANITIZERS = {
    "thread": ("-fsanitize=thread",),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DFREE_TENSORS"),
}
NATIVE_SOURCES = [NATIVE / f"{name}.cpp" for name in ("batch", "handle", "lane", "run", "stream")]
SEEDS = (1, 2)
ROUNDS = 20


def compile_with(sanitizer, name, *sources):
    try:
        return compile_once(name, [*sources], *SANITIZERS[sanitizer])
    except (RuntimeError, OSError) as error:
        pytest.fail(
            f"the {sanitizer} sanitizer could not be tried; it comes with gcc (libtsan, libasan): "
            f"{error}"
        )


def run(program, *arguments):
    # ThreadSanitizer knows where a kernel puts a program only while it does not place it at random.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=1",
    }
    return subprocess.run(
        [*fixed, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_lanes_under_stress_give_a_sanitizer_nothing_to_say(sanitizer, seed):
    sources = [
        HERE / "stress.cpp",
        *C_SOURCES,
        *NATIVE_SOURCES,
    ]
    result = run(compile_with(sanitizer, "stress", *sources), seed, ROUNDS)
    assert (result.stdout, result.stderr, result.returncode) == (f"{ROUNDS} rounds\n", "", 0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_batches_under_stress_give_a_sanitizer_nothing_to_say(sanitizer, seed):
    sources = [
        HERE / "stress_batches.cpp",
        *C_SOURCES,
        *NATIVE_SOURCES,
    ]
    result = run(compile_with(sanitizer, "stress_batches", *sources), seed, ROUNDS)
    assert (result.stdout.splitlines()[-1:], result.stderr, result.returncode) == (
        [f"{ROUNDS} rounds"],
        "",
        0,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_streams_under_stress_give_a_sanitizer_nothing_to_say(sanitizer, seed):
    sources = [HERE / "stress_streams.cpp", *C_SOURCES, *NATIVE_SOURCES]
    result = run(compile_with(sanitizer, "stress_streams", *sources), seed, ROUNDS)
    assert (result.stdout, result.stderr, result.returncode) == (f"{ROUNDS} rounds\n", "", 0)


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        (
            "held_.push_back(std::move(another));",
            "another.reset();",
            "memory is given back that stream",
        ),
        (
            "if (fence.fence == nullptr) return;",
            "if (fence.fence != nullptr) return;",
            "not so|heap-use-after-free",
        ),
        (
            "if (device_.one_at_a_time) lock_",
            "if (false) lock_",
            "one work at a time has the device",
        ),
        (
            "held_.push_back(std::move(host));",
            "shim.delete_tensor(host.get()); held_.push_back(std::move(host));",
            "",
        ),
    ],
    ids=[
        "inputs are not held",
        "the device is not waited for",
        "no lock is taken",
        "a handle is freed twice",
    ],
)
def test_the_stress_of_streams_sees_what_it_is_there_for(line, instead, words, tmp_path):
    """Or it could not fail."""
    source = (NATIVE / "stream.cpp").read_text()
    assert source.count(line) == 1
    broken = tmp_path / "stream.cpp"
    broken.write_text(source.replace(line, instead))
    others = [path for path in NATIVE_SOURCES if path.name != "stream.cpp"]
    program = compile_with(
        "address", "stress_streams", HERE / "stress_streams.cpp", *C_SOURCES, *others, broken
    )
    # On a busy machine, two threads may not meet in every walk.
    results = (run(program, seed, ROUNDS) for seed in range(1, 9))
    result = next((one for one in results if one.returncode != 0), None)
    assert result is not None
    assert re.search(words, result.stderr)


@pytest.mark.parametrize("stress", ["stress", "stress_batches"])
def test_the_stress_of_runs_sees_inputs_that_outlive_their_run(stress, tmp_path):
    """Or its check of the inputs could not fail."""
    source, line = (NATIVE / "run.cpp").read_text(), "  work_ = Work();\n"
    assert source.count(line) == 1
    broken = tmp_path / "run.cpp"
    kept = "  static thread_local Work kept;\n  kept = std::move(work_);\n"
    broken.write_text(source.replace(line, kept))
    others = [path for path in NATIVE_SOURCES if path.name != "run.cpp"]
    program = compile_with("address", stress, HERE / f"{stress}.cpp", *C_SOURCES, *others, broken)
    result = run(program, 1, ROUNDS)
    assert result.returncode != 0
    assert "a run here leaves no input" in result.stderr


@pytest.mark.parametrize(
    ("sanitizer", "fault", "report"),
    [
        ("thread", "race", "data race"),
        ("address", "use after free", "heap-use-after-free"),
        ("address", "leak", "detected memory leaks"),
        ("address", "overflow", "signed integer overflow"),
    ],
)
def test_the_sanitizers_see_what_they_are_there_for(sanitizer, fault, report):
    """Or the test above could not fail."""
    result = run(compile_with(sanitizer, "faults", HERE / "faults.cpp"), fault)
    assert result.returncode != 0
    assert report in result.stderr


@pytest.mark.parametrize(("fault", "least"), [("memory", 100), ("threads", 3)])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_failed_allocation_or_thread_start_loses_a_work(sanitizer, fault, least):
    sources = [HERE / "starved.cpp", *C_SOURCES, *NATIVE_SOURCES]
    result = run(compile_with(sanitizer, "starved", *sources), fault)
    assert (result.stderr, result.returncode) == ("", 0)
    faults, word = result.stdout.split()
    assert word == "faults"
    assert int(faults) >= least


@pytest.mark.parametrize(
    ("file", "line", "instead", "words"),
    [
        (
            "lane.cpp",
            "completion.front() = run.finish();",
            "std::make_unique<int>(1); completion.front() = run.finish();",
            "bad_alloc",
        ),
        ("run.cpp", 'error = "out of memory";', "", "has a text"),
    ],
    ids=["a completion needs memory", "a failure has no text"],
)
def test_the_starved_lanes_see_what_they_are_there_for(file, line, instead, words, tmp_path):
    """Or it could not fail."""
    source = (NATIVE / file).read_text()
    assert source.count(line) == 1
    broken = tmp_path / file
    broken.write_text(source.replace(line, instead))
    others = [path for path in NATIVE_SOURCES if path.name != file]
    program = compile_with("address", "starved", HERE / "starved.cpp", *C_SOURCES, *others, broken)
    result = run(program, "memory")
    assert result.returncode != 0
    assert words in result.stderr
