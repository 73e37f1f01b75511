"""Every example runs as its own first lines say, and prints what a reader should see."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path for path in (REPOSITORY / "examples").iterdir() if path.suffix == ".py")

# What each program prints, at least.
PROGRAMS = {
    "batching": [
        "one by one  4,000 requests in 4,000 runs",
        "batched     4,000 requests in ",
        "answers     the same",
        "batch_size  [",
        "rows        3 asked for, as many returned",
        "bad song    1000 failed: model 'batched': the run failed: index out of bounds",
        "the others  4 answered",
    ],
    "colours": ["eye.pt2", "namer.pt2"],
    "first_steps": [
        "namer(rgb) on cpu",
        "run         ['red', 'blue']",
        "urgent      ['yellow']",
        "submit      ['green']",
        "trace       lane ",
        "bad input   model 'namer', input 'rgb': expected size 3 at dimension 1",
        "[['black'], ['white']]",
        "stats       6 of 6 done",
    ],
    "from_config": [
        "eye    2 instance(s) of 1 thread(s), takes float32[batch:1..16, 3, 64, 64]",
        "a photo of something orange is called orange",
        "a photo of something purple is called purple",
    ],
    "many_models": [
        "loaded      6 models: 48 MiB are there, 48 MiB parked",
        " of 200 by models that were there, half of them within ",
        " of 200 by models that had to come back, half of them within ",
        "parked      expert-0 ",
        "memory      the process has grown by ",
        "all at once 30 answered, all the same",
        (
            "refused     device 'cpu': model 'one more' needs 16.0 MiB for its weights, and the "
            "memory_limit is 50.0 MiB; taken: "
        ),
        "'expert-0' 16.0 MiB (it has held leases)",
    ],
    "observed": [
        "exposed     as 'observed'; the live page is http://127.0.0.1:",
        "latency     of ",
        "event loop  late by at most ",
        "slowest     ",
        " waited ",
        "timeline    ",
        " samples, such as",
        'aoti_sched_requests_total{device="cpu",outcome="completed"',
        "observed, process ",
        "eye     cpu     ok ",
    ],
    "overload": [
        "capacity    ",
        "0.5 times the capacity, no bound",
        "5 times the capacity, a bound, the worst dropped",
        "5 times the capacity, refused by prediction",
        " answered in time; half of them knew after ",
        " refused: it could not have been in time; half of them knew after ",
        " of those in time were a paying customer's",
    ],
    "pipeline": [
        "1 running, 8 queued",
        "199 of 200 named correctly, 1 cancelled",
        "eye        199 completed, 1 cancelled, 0 failed",
        "namer      199 completed, 0 cancelled, 0 failed",
    ],
    "replicas": [
        "loaded      sharpness on cpu:0, cpu:1",
        "answered    200 of 200: ",
        " on cpu:0, ",
        " on cpu:1\n",
        "updated     to epoch 2 on both devices at one instant; ",
        "drained     cpu:1, ",
        " requests moved\nanswered    200 of 200: ",
        "in service  cpu:0\n",
    ],
    "two_tenants": [
        "alone       a look takes ",
        "one queue   the first look took ",
        "tenants     the first look took ",
        "of 400: runner 'bounded': tenant 'archivist' has 100 jobs queued, its bound is 100.",
        "of the archive were answered, and 20 of 20 looks",
    ],
}
# Arguments that make a program shorter, and change nothing else.
SHORTER = {"overload": ["--seconds", "0.5"]}
# The glue around the kernels computes the same unoptimized, and compiles faster.
QUICK = {"AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0"}


def run(*arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **QUICK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_example_runs_and_prints_what_it_should(program):
    printed = run("-m", f"examples.{program}", *SHORTER.get(program, []))
    for piece in PROGRAMS[program]:
        assert piece in printed


def test_generation_writes_each_text_with_the_weights_of_one_epoch():
    printed = run("-m", "examples.generation")
    found = re.search(r"exactness   (\d+) of (\d+) texts are those of the one epoch", printed)
    same, texts = map(int, found.groups())
    # Compiled code rounds otherwise, which exchanges letters that are nearly as likely.
    assert same >= 0.9 * texts
    assert texts >= 24
    assert len(re.findall(r"\d+ of epoch \d", printed)) > 1


def test_testing_your_app_passes_its_own_tests():
    path = "examples/testing_your_app.py"
    written = (REPOSITORY / path).read_text().count("async def test_")
    assert f"{written} passed" in run("-m", "pytest", "-p", "no:cacheprovider", path)


@pytest.fixture
def web_app():
    """The address of the web application, served by a process of its own."""
    command = [sys.executable, "-u", "-m", "examples.web_app", "--port", "0"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            yield _address(server)
            server.send_signal(signal.SIGINT)
            rest = server.communicate(timeout=60)[0]
            assert server.returncode == 0, rest
        finally:
            server.kill()


def _address(server):
    printed = []
    for line in server.stdout:
        printed.append(line)
        if found := re.search(r"running on (http://[\d.:]+)", line):
            return found[1]
    raise AssertionError("the server did not start:\n" + "".join(printed))


def test_web_app_names_colours_and_explains_a_question_that_does_not_fit(web_app):
    def ask(question):
        request = urllib.request.Request(f"{web_app}/name", json.dumps(question).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    assert ask({"rgb": [[230, 30, 40], [20, 60, 220]]}) == (200, {"names": ["red", "blue"]})
    status, answer = ask({"rgb": [[230, 30]]})
    assert status == 422
    assert "model 'namer', input 'rgb': expected size 3" in answer["error"]


def test_every_example_has_a_test():
    here = [name for name in globals() if name.startswith("test_")]
    tests = " ".join([*here, *(path.stem for path in Path(__file__).parent.glob("test_*.py"))])
    untested = [
        path.name for path in EXAMPLES if path.stem not in PROGRAMS and path.stem not in tests
    ]
    assert not untested


def test_the_readme_lists_every_example():
    readme = (REPOSITORY / "examples" / "README.md").read_text()
    assert not [path.name for path in EXAMPLES if f"`{path.name}`" not in readme]
