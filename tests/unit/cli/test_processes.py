"""`stats`, `timeline` and `weights`: commands that look into another process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from aoti_sched import ExposeError
from tests.unit.cli.exposed import ROOT, exposed, folder_for_sockets, variables
from tests.unit.cli.support import json_of, refused, run

pytest.importorskip("starlette", reason="exposing needs the extra expose")
pytest.importorskip("uvicorn", reason="exposing needs the extra expose")

from aoti_sched.expose.reports import StatsReport


@pytest.fixture(scope="module")
def folder():
    with folder_for_sockets() as made:
        yield made


@pytest.fixture(scope="module")
def env(folder):
    return variables(folder)


@pytest.fixture(scope="module")
def app(folder):
    """A process with a socket and a port."""
    with exposed(folder, "--name", "app", "--port", 0) as exposure:
        yield exposure


@pytest.fixture
def empty():
    with folder_for_sockets() as made:
        yield made


# --- which process --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["alone", "pid", "name", "both", "path", "url"])
def test_the_process_is_found(app, env, how):
    wanted = {
        "alone": (),
        "pid": (app["pid"],),
        "name": ("app",),
        "both": (f"{app['pid']}-app",),
        "path": (app["path"],),
        "url": (app["url"],),
    }
    report = json_of("stats", *wanted[how], env=env)
    assert (report["version"], report["pid"], report["name"]) == (1, app["pid"], "app")
    assert {*report["stats"]["devices"]["cpu"]["runners"]} == {"slow", "quick"}


def test_several_processes_are_listed(app, folder, env):
    with exposed(folder, "--name", "app") as second:
        both = {f"{each['pid']}-app" for each in (app, second)}
        for wanted in ((), ("app",)):
            line = refused("stats", *wanted, env=env)
            assert line.startswith("several schedulers are exposed: ")
            assert line.endswith(". Name one of them.")
            assert {*re.findall(r"\d+-app", line)} == both
        assert json_of("stats", second["pid"], env=env)["pid"] == second["pid"]
    assert json_of("stats", env=env)["pid"] == app["pid"]


def test_an_option_from_the_environment_names_the_process(app, env):
    named = {**env, "AOTI_SCHED_TIMELINE_SECONDS": "nonsense"}
    assert "--seconds: 'nonsense' is no time." in refused("timeline", env=named)


@pytest.mark.parametrize(
    ("wanted", "code", "says"),
    [
        ("nothing", 1, "no exposed scheduler is called 'nothing'. There are "),
        ("99999999", 1, "no exposed scheduler is called '99999999'."),
        ("localhost:8765", 1, "app. For a port, write http://localhost:8765."),
        ("127.0.0.1:80/", 1, "directory. The exposed schedulers are at "),
        ("127.0.0.1:80/", 1, "-app.sock. For a port, write http://127.0.0.1:80."),
        ("app:x", 1, "-app."),
        (
            "/nowhere.sock",
            1,
            "/nowhere.sock: No such file or directory. The exposed schedulers are at ",
        ),
        ("/etc/hostname", 2, "/etc/hostname: this is no socket."),
        ("https://127.0.0.1:1", 2, "expected an address such as http://127.0.0.1:8001."),
        ("http://127.0.0.1", 2, "expected an address such as http://127.0.0.1:8001."),
        ("http://127.0.0.1:x", 2, "expected an address such as http://127.0.0.1:8001."),
        ("http://[::1:80", 2, "expected an address such as http://127.0.0.1:8001."),
        ("http://app..local:80", 2, "expected an address such as http://127.0.0.1:8001."),
        ("http://127.0.0.1:1", 1, "http://127.0.0.1:1 can't be reached: Connection refused."),
    ],
)
def test_a_process_that_is_not_there_is_said_in_a_sentence(app, env, wanted, code, says):
    for command in ("stats", "timeline"):
        assert says in refused(command, wanted, env=env, code=code)


def test_without_any_process_the_error_says_how_to_expose_one(empty):
    line = refused("stats", env=variables(empty), code=1)
    assert line.startswith("no scheduler of this user is exposed.")
    line = refused("stats", "localhost:1", env=variables(empty), code=1)
    assert line.endswith("scheduler.expose()`. For a port, write http://localhost:1.")
    line = refused("stats", "/nowhere.sock", env=variables(empty), code=1)
    assert line.startswith("/nowhere.sock: No such file or directory. No scheduler of this user is")
    assert not list(empty.iterdir())  # looking makes nothing


def test_a_killed_process_is_gone_from_the_list(empty):
    with exposed(empty) as exposure:
        os.kill(exposure["pid"], signal.SIGKILL)
        os.waitid(os.P_PID, exposure["pid"], os.WEXITED | os.WNOWAIT)  # its socket is closed then
        assert "no scheduler of this user" in refused("stats", env=variables(empty), code=1)
        assert not Path(exposure["path"]).exists()


def test_a_process_that_is_something_else_is_recognised(env):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def serve(answer):
            client, _ = server.accept()
            with client:
                client.recv(1000)
                client.sendall(answer)

        for answer, says in [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "is no scheduler of aoti_sched."),
            (
                b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"version":2}',
                "answers in version 2 of the format, and this program knows version 1.",
            ),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "broke its answer off"),
            (b"garbage\r\n", "broke its answer off (BadStatusLine)."),
            (b"HTTP/1.1 503 X\r\n\r\n", "has too many clients."),
        ]:
            thread = threading.Thread(target=serve, args=(answer,))
            thread.start()
            assert says in refused("stats", url, env=env, code=1)
            thread.join()


def test_a_process_that_does_not_answer_is_given_up(tmp_path):
    from aoti_sched.cli.processes import choose, pieces

    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = choose(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ExposeError, match=r"did not answer for 0\.1 s. Its event loop may be"):
            list(pieces(target, "/timeline", patience=0.1))


# --- stats ----------------------------------------------------------------------------------------


def test_the_numbers_are_a_report_and_a_table(app, env):
    first = msgspec.convert(json_of("stats", env=env), StatsReport)
    second = msgspec.convert(json_of("stats", env=env), StatsReport)
    done = [report.stats.devices["cpu"].runners["quick"].completed for report in (first, second)]
    assert 0 < done[0] < done[1]
    shown = run("stats", env=env)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"app, process {app['pid']}, exposed for ")
    assert re.search(r"^cpu +\d/2 +", shown.stdout, re.MULTILINE)
    assert re.search(r"^slow +cpu +ok +1 +\d+ +\d+ +\d+ +0 +0 .* ms", shown.stdout, re.MULTILINE)


# --- timeline -------------------------------------------------------------------------------------


def test_a_timeline_is_written_whole(app, env, tmp_path):
    output = tmp_path / "run.json"
    report = json_of("timeline", "--seconds", "0.3", "-o", output, env=env)
    assert report == {
        "version": 1,
        "path": str(output),
        "bytes": output.stat().st_size,
        "seconds": 0.3,
    }
    events = json.loads(output.read_bytes())["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "run"} == {"slow", "quick"}
    assert list(tmp_path.iterdir()) == [output]
    shown = run("timeline", "app", "--seconds", "10ms", "-o", output, env=env)
    assert shown.stdout.startswith(f"{output}: 0.01 s of app (process {app['pid']}), ")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--seconds", "0"), 2, "--seconds: expected 10 ms to 5 minutes, got '0'."),
        (("--seconds", "1h"), 2, "--seconds: expected 10 ms to 5 minutes, got '1h'."),
        (("--seconds", "0.1", "-o", "/nowhere/x.json"), 1, "No such file or directory."),
    ],
)
def test_a_wrong_timeline_is_refused(app, env, arguments, code, says):
    assert says in refused("timeline", *arguments, env=env, code=code)


def test_an_interrupted_timeline_leaves_no_file(app, env, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "aoti_sched", "timeline", "--seconds", "200", "-o", "x.json"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
    )
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "aoti-sched: interrupted.\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    assert json_of("stats", env=env)["pid"] == app["pid"]  # and the process serves on


# --- weights --------------------------------------------------------------------------------------


def test_weights_of_a_process_that_allows_no_changes_stay(app, env, tmp_path):
    (tmp_path / "new.safetensors").write_bytes(b"")
    for arguments in (
        ("stage", "slow", tmp_path / "new.safetensors"),
        ("commit", "slow"),
        ("rollback", "slow", "quick"),
        ("extract", "slow", "-o", tmp_path / "out.safetensors"),
    ):
        line = refused("weights", *arguments, env=env, code=1)
        assert line.startswith(f"app (process {app['pid']}): this scheduler is exposed for reading")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("stage", "slow", "/nowhere.safetensors"), "/nowhere.safetensors: there is no such file."),
        (("stage", "slow"), "requires an argument"),
        (("commit",), "name at least one model."),
        (("rollback",), "name at least one model."),
        (("commit", "slow", "--barrier", "soon"), "soon"),
        (("commit", "slow", "--timeout", "soon"), "--timeout: 'soon' is no time."),
        (("extract", "slow", "-o", "x.pt"), "the name must end in .safetensors."),
        (("commit", "caf\udce9"), "a name or a path is no Unicode text"),
        (("swap",), "Unknown command"),
    ],
)
def test_a_wrong_change_of_weights_is_refused(app, env, arguments, says):
    assert says in refused("weights", *arguments, env=env)


def test_weights_of_a_port_are_refused(app, env, tmp_path):
    for arguments in (("commit", "slow"), ("extract", "slow", "-o", tmp_path / "x.safetensors")):
        line = refused("weights", *arguments, "--process", app["url"], env=env)
        assert line == (
            f"{app['url']}: weights are changed and extracted through the socket alone. Name the "
            "process by its id, its name or its socket."
        )
