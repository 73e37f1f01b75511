"""An exposed scheduler: what it answers, whom it refuses, and that requests never notice."""

import asyncio
import gc
import importlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import msgspec
import pytest
import structlog

from aoti_sched import (
    BlockingScheduler,
    ConfigError,
    ExposeError,
    RunnerClosedError,
    Scheduler,
)
from aoti_sched.expose import sockets
from aoti_sched.expose.reports import Exposure, StatsReport
from aoti_sched.testing import FakeBackend
from tests.unit.expose.support import Answer, connect, get, post, request, scheduler_of

pytest.importorskip("starlette", reason="exposing needs the extra expose")
pytest.importorskip("uvicorn", reason="exposing needs the extra expose")


def mode(exposure):
    return stat.S_IMODE(Path(exposure.path).stat().st_mode)


async def until(true):
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not come true")


# --- reading --------------------------------------------------------------------------------------


async def test_the_stats_are_those_of_the_scheduler(runtime_dir):
    folder = runtime_dir / "aoti_sched"
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose("app")
        assert (exposure.name, exposure.pid, exposure.url) == ("app", os.getpid(), None)
        assert mode(exposure) == 0o600
        assert [found.path for found in sockets.find()] == [exposure.path]
        assert await runner.run("abc") == 3
        answer = await get(exposure, "/stats")
        report = msgspec.json.decode(answer.body, type=StatsReport)
        assert report.stats == scheduler.stats()
        assert (report.version, report.name, report.pid) == (1, "app", os.getpid())
        assert report.stats.devices["cpu"].runners["m"].completed == 1
    assert not list(folder.iterdir())
    assert sockets.find() == []


async def test_the_stream_sends_newer_and_newer_numbers():
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        reader, writer = await connect(exposure)
        writer.write(request("/stream?interval=0.1"))
        completed = []
        while len(completed) < 3:
            line = await reader.readline()
            if line.startswith(b"data: "):
                report = msgspec.json.decode(line[6:], type=StatsReport)
                completed.append(report.stats.devices["cpu"].runners["m"].completed)
                await runner.run("abc")
        assert completed == [0, 1, 2]
        writer.close()


async def test_a_timeline_has_the_runs_of_its_time():
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        await runner.run("before")
        asked = asyncio.ensure_future(get(exposure, "/timeline?seconds=1"))
        await until(lambda: scheduler._observers.if_any() is not None)
        await runner.run("abc")
        await asyncio.gather(*[runner.run("abc") for _ in range(1000)])
        answer = await asked
        events = answer.json["traceEvents"]
        assert sum(event.get("cat") == "run" for event in events) == 1001
        assert scheduler._observers.if_any() is None


async def test_only_a_few_recordings_go_on_at_once_and_end_with_their_clients():
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose()
        writers = []
        for _ in range(2):
            _, writer = await connect(exposure)
            writer.write(request("/timeline?seconds=300"))
            writers.append(writer)
        await until(lambda: len(scheduler._observers._recordings) == 2)
        refused = await get(exposure, "/timeline?seconds=1")
        assert refused.status == 429
        assert refused.json["error"].startswith("2 recordings go on already.")
        for writer in writers:
            writer.close()
        await until(lambda: scheduler._observers.if_any() is None)
        assert (await get(exposure, "/timeline?seconds=0.01")).status == 200


async def test_health_names_the_problems():
    def broken(_):
        raise ValueError("broken")

    async with scheduler_of(bad=broken) as (scheduler, _):
        exposure = await scheduler.expose()
        healthy = await get(exposure, "/health")
        assert (healthy.status, healthy.json["status"]) == (200, "ok")
        bad = await scheduler.load("bad.pt2")
        for _ in range(5):
            with pytest.raises(Exception, match="broken"):
                await bad.run(1)
        await asyncio.sleep(0.06)  # all readers of one moment get the same numbers
        sick = await get(exposure, "/health")
        assert sick.status == 503
        assert sick.json["problems"] == ["runner 'bad' on 'cpu' is failing"]


async def test_metrics_are_those_of_the_collector():
    pytest.importorskip("prometheus_client")
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        await runner.run("abc")
        answer = await get(exposure, "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        line = 'aoti_sched_requests_total{device="cpu",outcome="completed",priority="NORMAL"'
        assert line in answer.body.decode()


async def test_without_the_extra_metrics_are_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "aoti_sched.expose.metrics", raising=False)
    async with scheduler_of() as (scheduler, _):
        answer = await get(await scheduler.expose(), "/metrics")
        assert (answer.status, "aoti_sched[metrics]" in answer.json["error"]) == (501, True)


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/nothing", 404, "/nothing: there is no such page."),
        ("/stream?interval=0", 400, "interval: expected 0.1 to 60 seconds, got '0'."),
        ("/timeline?seconds=nan", 400, "seconds: expected 0.01 to 300 seconds, got 'nan'."),
        ("/timeline?seconds=1e9", 400, "seconds: expected"),
        ("/page/../reports.py", 404, ""),
        ("/page/%2e%2e/reports.py", 404, ""),
    ],
)
async def test_a_wrong_request_gets_a_sentence(path, status, says):
    async with scheduler_of() as (scheduler, _):
        answer = await get(await scheduler.expose(), path)
        assert answer.status == status
        assert says in answer.json["error"]


async def test_other_methods_are_refused():
    async with scheduler_of() as (scheduler, _):
        answer = await post(await scheduler.expose(), "/stats")
        assert (answer.status, answer.json["error"]) == (405, "/stats: POST is not for this page.")


# --- the port -------------------------------------------------------------------------------------


async def test_the_port_is_on_the_loopback_interface_and_has_the_page():
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose(port=0)
        assert exposure.url.startswith("http://127.0.0.1:")
        for host in ("127.0.0.1", "localhost", "localhost:99"):
            page = await get(exposure.url, "/", host=host)
            assert page.status == 200
            assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        assert "frame-ancestors 'none'" in policy
    with pytest.raises(ConnectionRefusedError):
        await connect(exposure.url)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8001"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
async def test_pages_of_other_origins_are_kept_out(headers):
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose(port=0)
        answer = await get(exposure.url, "/stats", **headers)
        assert answer.status == 403
        assert b"devices" not in answer.body
        assert "access-control-allow-origin" not in answer.headers
        assert (await get(exposure, "/stats", **headers)).status == 200  # the socket is for us


async def test_the_page_itself_can_ask():
    async with scheduler_of() as (scheduler, _):
        url = (await scheduler.expose(port=0)).url
        own = {"host": "127.0.0.1:5", "Origin": "http://127.0.0.1:5"}
        assert (await get(url, "/stats", **own, Sec_Fetch_Site="same-origin")).status == 200
        assert (await get(url, "/", Sec_Fetch_Site="cross-site")).status == 200  # a link


async def test_the_port_never_changes_weights():
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose(port=0, weights=True)
        body = {"method": "POST", "body": b'{"runners": ["m"]}', "host": "127.0.0.1"}
        assert (await get(exposure.url, "/weights/commit", **body)).status == 404
        assert (await get(exposure.url, "/stats")).json["weights"] is False
        assert (await get(exposure, "/stats")).json["weights"] is True


async def test_a_taken_port_is_named_and_nothing_stays_open():
    async with scheduler_of() as (scheduler, _), scheduler_of() as (second, _):
        url = (await scheduler.expose(port=0)).url
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ExposeError, match=rf"expose\(port={port}\): .*Choose another port"):
            await second.expose(port=port)
        assert len(sockets.find()) == 1
        await second.expose(port=0)


@pytest.mark.parametrize("port", [-1, 65536, "8001", True, 1.5])
async def test_a_wrong_port_is_refused(port):
    async with scheduler_of() as (scheduler, _):
        with pytest.raises(ConfigError, match=r"expose\(port=\): expected a number"):
            await scheduler.expose(port=port)
        assert sockets.find() == []


# --- the life of an exposure ----------------------------------------------------------------------


async def test_two_schedulers_of_one_process_have_two_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py"])
    async with scheduler_of() as (one, runner), scheduler_of() as (two, _):
        first, second = await one.expose(), await two.expose()
        assert (first.name, second.name) == ("app", "app-2")
        await runner.run("abc")
        counts = [
            (await get(each, "/stats")).json["stats"]["devices"]["cpu"]["runners"]["m"]["completed"]
            for each in (first, second)
        ]
        assert counts == [1, 0]


async def test_a_scheduler_is_exposed_once():
    async with scheduler_of() as (scheduler, _):
        results = await asyncio.gather(
            scheduler.expose("a"), scheduler.expose("b"), return_exceptions=True
        )
        assert isinstance(results[0], Exposure)
        assert isinstance(results[1], ExposeError)
        assert [found.name for found in sockets.find()] == ["a"]
        assert str(results[1]) == (
            "expose(): this scheduler is exposed already, as 'a' at "
            f"{results[0].path} and without a port. Ask for a port, and for weights=True, in the "
            "first call."
        )


async def test_a_second_call_of_expose_is_told_of_the_port():
    async with scheduler_of() as (scheduler, _):
        url = (await scheduler.expose(port=0)).url
        with pytest.raises(ExposeError) as caught:
            await scheduler.expose(port=0)
        assert f" and {url}. Ask for a port" in str(caught.value)


async def test_only_an_open_scheduler_is_exposed():
    scheduler = Scheduler(devices={"cpu": FakeBackend({"m": len})})
    with pytest.raises(RunnerClosedError):
        await scheduler.expose()
    async with scheduler:
        with pytest.raises(ConfigError, match="weights"):
            await scheduler.expose(weights="yes")
    with pytest.raises(RunnerClosedError):
        await scheduler.expose()


@pytest.mark.parametrize("port", [None, 0])
async def test_a_cancelled_expose_leaves_nothing(port):
    for steps in range(100):
        with structlog.testing.capture_logs() as logs:
            async with scheduler_of() as (scheduler, _):
                task = asyncio.ensure_future(scheduler.expose(port=port))
                for _ in range(steps):
                    await asyncio.sleep(0)
                if task.done():
                    break
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert sockets.find() == []
                exposure = await scheduler.expose(port=0)
                for each in (exposure, exposure.url):
                    assert (await asyncio.wait_for(get(each, "/stats"), 20)).status == 200
        assert [log for log in logs if log["log_level"] != "info"] == []
    assert steps > 1


async def test_closing_while_it_opens_hangs_nothing():
    async with scheduler_of() as (scheduler, _):
        task = asyncio.ensure_future(scheduler.expose())
        await asyncio.sleep(0)
    await asyncio.wait({task})
    assert sockets.find() == []


async def test_a_closed_scheduler_is_no_part_of_a_cycle():
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        assert (await get(exposure, "/stats")).status == 200
    watched = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler, runner
        await until(lambda: watched() is None)
    finally:
        gc.enable()


async def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("aoti_sched.expose.")]:
        if name != "aoti_sched.expose.reports":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    async with scheduler_of() as (scheduler, _):
        with pytest.raises(ExposeError, match=r"pip install 'aoti_sched\[expose\]'"):
            await scheduler.expose()


async def test_signals_and_logging_stay_as_they_were(caplog):
    caplog.set_level(logging.DEBUG)
    signals = (signal.SIGINT, signal.SIGTERM)
    own = logging.StreamHandler()  # of the application's own uvicorn
    access = logging.getLogger("uvicorn.access")
    access.addHandler(own)

    def everything():
        loggers = [logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.error")]
        return [
            *map(signal.getsignal, signals),
            *((one.level, one.propagate, list(one.handlers)) for one in (*loggers, access)),
        ]

    before = everything()
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose(port=0)
        assert (await get(exposure, "/stats")).status == 200
        assert everything() == before
    access.removeHandler(own)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_a_blocking_scheduler_is_exposed_as_well():
    with BlockingScheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        runner = scheduler.load("m.pt2")
        exposure = scheduler.expose("blocking", port=0)
        assert runner.run("abc") == 3
        answer = asyncio.run(get(exposure, "/stats"))
        assert answer.json["stats"]["devices"]["cpu"]["runners"]["m"]["completed"] == 1
    assert sockets.find() == []


def test_uvloop_serves_it_as_well():
    uvloop = pytest.importorskip("uvloop")

    async def main():
        async with scheduler_of() as (scheduler, _):
            exposure = await scheduler.expose(port=0)
            return [(await get(each, "/stats")).status for each in (exposure, exposure.url)]

    loop = uvloop.new_event_loop()
    assert loop.run_until_complete(main()) == [200, 200]
    loop.close()


# --- slow clients and clients that go away --------------------------------------------------------


async def test_a_client_that_never_reads_holds_up_neither_requests_nor_the_close():
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        lazy = [await connect(exposure) for _ in range(5)]
        for _, writer in lazy:
            writer.transport.pause_reading()
            writer.write(request("/stream?interval=0.1"))
        assert await asyncio.gather(*[runner.run("abc") for _ in range(500)]) == [3] * 500
        assert (await get(exposure, "/stats")).status == 200
    assert scheduler.stats().devices["cpu"].runners["m"].completed == 500
    for _, writer in lazy:
        writer.close()


@pytest.mark.parametrize("uvloop", [False, True])
def test_a_large_answer_that_is_not_read_does_not_hold_up_the_close(uvloop):
    async def main():
        async with scheduler_of() as (scheduler, runner):
            exposure = await scheduler.expose()
            reader, writer = await connect(exposure)
            writer.write(request("/timeline?seconds=0.5"))
            await until(lambda: scheduler._observers.if_any() is not None)
            for _ in range(20):
                await asyncio.gather(*[runner.run("abc") for _ in range(200)])
            await until(lambda: scheduler._observers.if_any() is None)
            await reader.readuntil(b"traceEvents")  # and nothing more
            assert await runner.run("abc") == 3
        assert len(asyncio.all_tasks()) == 1
        writer.close()

    loops = pytest.importorskip("uvloop") if uvloop else asyncio
    loop = loops.new_event_loop()
    loop.run_until_complete(main())
    loop.close()


async def test_streams_end_with_the_scheduler():
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose()
        reader, writer = await connect(exposure)
        writer.write(request("/stream?interval=60"))
        await reader.readuntil(b"data: ")
    content = await asyncio.wait_for(reader.read(), 20)
    assert content.endswith(b"0\r\n\r\n")  # the end of a whole answer
    writer.close()


async def test_a_recording_ends_with_the_scheduler():
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        reader, writer = await connect(exposure)
        writer.write(request("/timeline?seconds=300"))
        await until(lambda: scheduler._observers.if_any() is not None)
        await runner.run("abc")
    answer = Answer(await asyncio.wait_for(reader.read(), 20))
    assert answer.status == 200
    writer.close()


async def test_streams_of_clients_that_went_away_end():
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose()
        server = scheduler._door._servers[0]
        for _ in range(10):
            reader, writer = await connect(exposure)
            writer.write(request("/stream?interval=0.1"))
            await reader.readuntil(b"data: ")
            writer.transport.abort()
        await until(lambda: not server.server_state.tasks)
        assert not server.server_state.connections


async def test_more_clients_than_are_served_get_a_refusal():
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        clients = [await connect(exposure) for _ in range(70)]
        refused = await get(exposure, "/stats")
        assert refused.status == 503
        assert await runner.run("abc") == 3
        for _, writer in clients:
            writer.close()
        server = scheduler._door._servers[0]
        await until(lambda: not server.server_state.connections)
        assert (await get(exposure, "/stats")).status == 200


@pytest.mark.parametrize(
    "garbage", [b"\0\xff" * 500 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"x"]
)
async def test_what_is_not_http_does_no_harm(caplog, garbage):
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose()
        reader, writer = await connect(exposure)
        writer.write(garbage)
        writer.write_eof()
        await reader.read()
        assert await runner.run("abc") == 3
        assert (await get(exposure, "/stats")).status == 200
        writer.close()
    assert caplog.records == [], "any user of the machine could fill the log"


def test_a_forked_child_keeps_neither_the_socket_nor_the_port_open():
    program = """
        import asyncio, os, time
        from aoti_sched import Scheduler

        async def main():
            async with Scheduler() as scheduler:
                exposure = await scheduler.expose("app", port=0)
                child = os.fork()
                if child:
                    print(child, exposure.path, exposure.url.split(":")[2].strip("/"), flush=True)
                    os._exit(0)
                time.sleep(600)

        asyncio.run(main())
    """
    # The child has the pipe, too: to read until its end would be to wait for the child.
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
    ) as process:
        child, path, port = process.stdout.readline().decode().split()
        process.wait()
        try:
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect(path)
            with socket.socket() as client, pytest.raises(ConnectionRefusedError):
                client.connect(("127.0.0.1", int(port)))
            assert sockets.find() == []
        finally:
            os.kill(int(child), signal.SIGKILL)


# --- weights --------------------------------------------------------------------------------------


async def test_weights_are_for_reading_unless_the_program_says_otherwise():
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose()
        answer = await post(exposure, "/weights/commit", runners=["m"])
        assert answer.status == 403
        assert "expose(weights=True)" in answer.json["error"]


@pytest.mark.parametrize(
    ("verb", "body", "status", "says"),
    [
        ("commit", {}, 400, "missing required field `runners`"),
        ("commit", {"runners": []}, 400, "at least one name"),
        ("commit", {"runners": ["x"]}, 404, "no runner is named 'x'. The runners are 'm'."),
        ("commit", {"runners": ["m"], "other": 1}, 400, "unknown field `other`"),
        ("commit", {"runners": ["m"], "barrier": "soon"}, 400, "barrier"),
        ("commit", {"runners": ["m"], "timeout": -1}, 400, "timeout"),
        ("stage", {"runner": "m", "file": "relative"}, 400, "expected an absolute path"),
        ("stage", {"runner": "m", "file": "/nothing.safetensors"}, 409, "nothing"),
        ("rollback", {"runners": ["m"]}, 409, ""),
        ("extract", {"runner": "m", "file": "/tmp/x.txt"}, 400, "a file named *.safetensors"),
    ],
)
async def test_a_wrong_change_of_weights_gets_a_sentence(verb, body, status, says):
    async with scheduler_of() as (scheduler, runner):
        exposure = await scheduler.expose(weights=True)
        answer = await post(exposure, f"/weights/{verb}", **body)
        assert answer.status == status, answer.json
        assert says in answer.json["error"]
        assert await runner.run("abc") == 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        *((body, 400) for body in (b"", b"{", b"[]", b"\xff", b"[" * 5000)),
        (b'{"runners": ["m"]}' + b" " * 70_000, 413),
    ],
)
async def test_a_body_that_is_no_request_is_refused(body, status):
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose(weights=True)
        answer = await get(exposure, "/weights/commit", method="POST", body=body)
        assert answer.status == status
        assert json.loads(answer.body)["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"3", b'{"runners"', b"\xff"])
async def test_a_body_that_is_no_object_is_told_the_fields(body):
    async with scheduler_of() as (scheduler, _):
        exposure = await scheduler.expose(weights=True)
        answer = await get(exposure, "/weights/commit", method="POST", body=body)
        assert answer.json["error"] == (
            "/weights/commit: expected a JSON object with 'runners', and where wanted 'barrier', "
            "'keep_previous', 'timeout'."
        )
        answer = await get(exposure, "/weights/extract", method="POST", body=body)
        assert answer.json["error"] == (
            "/weights/extract: expected a JSON object with 'runner' and 'file', and where wanted "
            "'inactive'."
        )


def test_the_package_brings_the_files_of_the_page():
    routes = importlib.import_module("aoti_sched.expose.routes")
    names = {path.name for path in routes.PAGE.iterdir()}
    assert {"index.html", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE.txt"} <= names
