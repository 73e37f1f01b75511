"""Spans of requests and batches: in memory, and sent to a receiver that decodes them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.server
import importlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import structlog

from aoti_sched import Batching, BlockingScheduler, SchedulerConfig
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from aoti_sched.exporters.opentelemetry import Tracing, add_span


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    yield provider
    provider.shutdown()


@pytest.fixture
def tracer(provider):
    return provider.get_tracer("the application")


def by_name(spans):
    found = {}
    for span in spans.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


async def test_a_request_is_a_span_with_the_stamps_of_its_job(clock, spans, provider, tracer):
    def slow(text):
        clock.advance(0.5)
        return len(text)

    backend = FakeBackend({"m": slow}, lanes=1, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        scheduler.add_observer(Tracing(provider, clock=clock.time))
        runner = await scheduler.load("m.pt2")
        first = runner.submit("a")
        with tracer.start_as_current_span("caller") as caller:
            future = runner.options(tag="order 1", tenant="t").submit("ab")
        clock.advance(0.25)
        await backend.step()
        await backend.step()
        assert [await first, await future] == [1, 2]
        await settle()
    names = by_name(spans)
    assert {name: len(of) for name, of in names.items()} == {
        "caller": 1,
        "aoti_sched.request": 1,
        "aoti_sched.queue": 1,
        "aoti_sched.run": 1,
    }
    (request,), (queue,), (run,) = (names[f"aoti_sched.{it}"] for it in ("request", "queue", "run"))
    assert request.parent.span_id == caller.get_span_context().span_id
    assert {queue.parent.span_id, run.parent.span_id} == {request.context.span_id}
    assert {span.context.trace_id for span in (request, queue, run)} == {
        caller.get_span_context().trace_id
    }
    times = [*map(seconds, (request, queue, run))]
    assert times == pytest.approx([1.25, 0.75, 0.5], abs=1e-6)
    assert queue.end_time == run.start_time
    assert request.status.status_code is StatusCode.UNSET
    assert dict(request.attributes) == {
        "aoti_sched.runner": "m",
        "aoti_sched.device": "cpu",
        "aoti_sched.epoch": 1,
        "aoti_sched.priority": "NORMAL",
        "aoti_sched.batch_size": 1,
        "aoti_sched.job": 2,
        "aoti_sched.placement": "lane",
        "aoti_sched.tag": "order 1",
        "aoti_sched.tenant": "'t'",
    }


@pytest.mark.parametrize(
    ("end", "state", "run"),
    [("expire", "EXPIRED", False), ("fail", "FAILED", True), ("cancel", "CANCELLED", False)],
)
async def test_a_request_that_fails_is_an_error(clock, spans, provider, tracer, end, state, run):
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        scheduler.add_observer(Tracing(provider, clock=clock.time))
        runner = await scheduler.load("m.pt2")
        first = runner.submit("a")
        with tracer.start_as_current_span("caller"):
            future = runner.options(timeout=1.0 if end == "expire" else None).submit("ab")
        if end == "expire":
            clock.advance(1.0)
        elif end == "cancel":
            future.cancel()
        await backend.step()
        if end == "fail":
            await backend.step(ValueError("broken"))
        await asyncio.wait({first, future})
        await settle()
    names = by_name(spans)
    (request,) = names["aoti_sched.request"]
    assert (request.status.status_code, request.status.description) == (StatusCode.ERROR, state)
    assert request.attributes["error.type"] == state
    assert ("aoti_sched.run" in names) == run
    for name in ("epoch", "batch_size", "placement"):
        assert (f"aoti_sched.{name}" in request.attributes) == run


async def test_a_batch_is_one_span_that_is_linked_to_its_members(clock, spans, provider, tracer):
    def slow(text):
        clock.advance(0.125)
        return [len(text)]

    backend = FakeBackend({"m": slow}, lanes=1, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        scheduler.add_observer(Tracing(provider, clock=clock.time))
        runner = await scheduler.load("m.pt2", batching=Batching(max_size=8, max_seconds=9.0))
        await runner_learns(runner, backend)
        first = runner.submit("a")
        await backend.running(1)
        futures = []
        for number in range(3):
            with tracer.start_as_current_span(f"caller {number}"):
                futures.append(runner.submit("ab"))
        futures.append(runner.submit("no caller"))
        await settle()
        await backend.step()
        await backend.step()
        await asyncio.wait({first, *futures})
        assert [future.trace.batch_size for future in futures] == [4] * 4
        await settle()
    names = by_name(spans)
    (batch,) = names["aoti_sched.batch"]
    requests, runs = names["aoti_sched.request"], names["aoti_sched.run"]
    assert batch.parent is None
    assert batch.attributes["aoti_sched.batch_size"] == 4
    assert seconds(batch) == pytest.approx(0.5, abs=1e-6)
    linked = [link.context.span_id for link in batch.links]
    assert linked == [request.context.span_id for request in requests]
    assert len(linked) == 3
    assert [[link.context.span_id for link in run.links] for run in runs] == [
        [batch.context.span_id]
    ] * 3


async def runner_learns(runner, backend):
    """Let a runner learn how long its runs take, before which it makes no batch."""
    for _ in range(10):
        future = runner.submit("a")
        await backend.step()
        await future


@pytest.mark.parametrize("fails_at", ["aoti_sched.request", "aoti_sched.batch"])
async def test_a_span_processor_that_raises_is_dropped_and_no_request_is_lost(
    clock, provider, tracer, fails_at
):
    class Broken(SpanProcessor):
        ends = 0

        def on_end(self, span):
            if span.name == fails_at:
                self.ends += 1
                raise ConnectionError("no collector")

    broken = Broken()
    provider.add_span_processor(broken)
    backend = FakeBackend({"m": lambda text: [len(text)]}, auto=True, clock=clock)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: pytest.fail(str(context)))
    with structlog.testing.capture_logs() as logs:
        async with fake_scheduler(backend, clock=clock) as scheduler:
            scheduler.add_observer(Tracing(provider, clock=clock.time))
            runner = await scheduler.load("m.pt2", batching=Batching(max_size=8, max_delay=0.0))
            for _ in range(3):
                with tracer.start_as_current_span("caller"):
                    futures = [runner.submit("ab") for _ in range(4)]
                assert await asyncio.gather(*futures) == [[2]] * 4
                assert max(future.trace.batch_size for future in futures) > 1
                await settle()
    assert broken.ends == 1
    (dropped,) = [log for log in logs if log["event"] == "observer dropped"]
    assert (dropped["observer"], str(dropped["error"])) == ("Tracing", "no collector")


@pytest.mark.parametrize("sampled", [True, False])
async def test_nothing_is_traced_without_a_caller_that_is(clock, spans, sampled):
    provider = TracerProvider() if sampled else TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        tracing = Tracing(provider, clock=clock.time)
        scheduler.add_observer(tracing)
        runner = await scheduler.load("m.pt2")
        if not sampled:
            with provider.get_tracer("a").start_as_current_span("caller"):
                future = runner.submit("ab")
        else:
            future = runner.submit("ab")
        assert await future == 2
        assert not hasattr(future, "_callers")
        scheduler.remove_observer(tracing)
        with provider.get_tracer("a").start_as_current_span("caller"):
            future = runner.submit("ab")
        assert await future == 2
        assert not hasattr(future, "_callers")
        await settle()
    assert {*by_name(spans)} <= {"caller"}


class RealClock:
    time = staticmethod(time.monotonic)


def test_a_thread_and_a_blocking_scheduler_have_their_callers_spans(spans, provider, tracer):
    backend = FakeBackend({"m": len}, auto=True, clock=RealClock())
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        scheduler.add_observer(Tracing(provider))
        runner = scheduler.load("m.pt2")
        with tracer.start_as_current_span("caller") as caller:
            begin = time.time_ns()
            assert runner.run("ab") == 2
            end = time.time_ns()
    (request,) = by_name(spans)["aoti_sched.request"]
    assert request.parent.span_id == caller.get_span_context().span_id
    assert begin - 1e6 <= request.start_time <= request.end_time <= end + 1e6


async def test_events_of_a_request_have_the_ids_of_its_caller(clock, provider, tracer):
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    config = SchedulerConfig(log_requests=True)
    with structlog.testing.capture_logs() as logs:
        async with fake_scheduler(backend, clock=clock, config=config) as scheduler:
            scheduler.add_observer(Tracing(provider, clock=clock.time))
            runner = await scheduler.load("m.pt2")
            with tracer.start_as_current_span("caller") as caller:
                future = runner.submit("ab")
            untraced = runner.submit("ab")
            await backend.step(ValueError("broken"))
            await backend.step()
            await asyncio.wait({future, untraced})
            await settle()
    context = caller.get_span_context()
    ids = {
        "trace_id": otel.format_trace_id(context.trace_id),
        "span_id": otel.format_span_id(context.span_id),
    }
    events = [log for log in logs if log["event"] in ("request", "run failed")]
    assert [{name: log.get(name) for name in ids} for log in events] == [
        ids,
        ids,
        {"trace_id": None, "span_id": None},
    ]


def test_a_processor_adds_the_ids_of_the_current_span(tracer):
    assert add_span(None, "info", {"event": "e"}) == {"event": "e"}
    with tracer.start_as_current_span("caller") as span:
        event = add_span(None, "info", {"event": "e", "trace_id": "known"})
    assert event["trace_id"] == "known"
    assert event["span_id"] == otel.format_span_id(span.get_span_context().span_id)


@pytest.fixture
def receiver():
    """An OTLP/HTTP receiver that decodes what it gets, as a collector does."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )

    got = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            got.append((self.path, ExportTraceServiceRequest.FromString(body)))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
    server.shutdown()
    server.server_close()
    thread.join()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def collector(receiver, tmp_path):
    """A real collector of OTLP, Rotel, which sends what it has understood to the receiver."""
    rotel = pytest.importorskip("rotel")
    port = free_port()
    command = [
        *(str(Path(rotel.__file__).with_name("rotel-agent")), "start"),
        *("--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}"),
        *("--otlp-http-endpoint", f"127.0.0.1:{port}"),
        *("--exporter", "otlp", "--otlp-exporter-protocol", "http"),
        *("--otlp-exporter-endpoint", receiver[0].removesuffix("/v1/traces")),
    ]
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as agent:
        for _ in range(600):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert agent.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1/traces"
        agent.terminate()


@pytest.mark.parametrize("through", ["nothing", "a collector"])
async def test_a_receiver_of_otlp_decodes_the_spans(clock, receiver, request, through):
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    address, got = receiver
    if through == "a collector":
        address = request.getfixturevalue("collector")
    provider = TracerProvider(resource=Resource.create({"service.name": "search"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address)))
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        scheduler.add_observer(Tracing(provider, clock=clock.time))
        runner = await scheduler.load("m.pt2")
        with provider.get_tracer("application").start_as_current_span("caller"):
            assert await runner.run("ab") == 2
        await settle()
    await asyncio.to_thread(provider.force_flush)
    await asyncio.to_thread(provider.shutdown)
    for _ in range(600):  # a collector waits a little for more spans
        if got:
            break
        await asyncio.sleep(0.1)
    assert {path for path, _ in got} == {"/v1/traces"}
    spans = {
        span.name: (scope.scope.name, span)
        for _, request in got
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert {name: scope for name, (scope, _) in spans.items()} == {
        "caller": "application",
        **{f"aoti_sched.{name}": "aoti_sched" for name in ("request", "queue", "run")},
    }
    asked, run = (spans[f"aoti_sched.{name}"][1] for name in ("request", "run"))
    assert run.parent_span_id == asked.span_id
    assert asked.parent_span_id == spans["caller"][1].span_id
    attributes = {one.key: one.value for one in asked.attributes}
    assert attributes["aoti_sched.runner"].string_value == "m"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    monkeypatch.delitem(sys.modules, "aoti_sched.exporters.opentelemetry")
    with pytest.raises(
        ModuleNotFoundError, match=r"needs the extra otel\. Run: pip install 'aoti_sched\[otel\]'"
    ):
        importlib.import_module("aoti_sched.exporters.opentelemetry")
