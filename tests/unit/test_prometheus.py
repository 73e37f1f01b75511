"""The collector: what a scrape says is what `stats()` says, to Prometheus itself as well."""

from __future__ import annotations

import asyncio
import importlib
import shutil
import subprocess
import sys
import threading

import pytest

from aoti_sched import BlockingScheduler, ConfigError, Limits, QueueFullError, Scheduler
from aoti_sched.config import SchedulerConfig
from aoti_sched.testing import FakeBackend, ManualClock

prometheus_client = pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from aoti_sched.exporters import prometheus  # noqa: E402
from aoti_sched.exporters.prometheus import Collector  # noqa: E402
from tests.unit.prometheus_server import needs_prometheus, prometheus_server  # noqa: E402


def scraped(collector):
    """Return the samples of a scrape, as (name, labels) to value."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }, text


async def work(clock):
    """Requests that end in several ways; returns their scheduler, which is to be terminated."""
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    scheduler = Scheduler(devices={"cpu": backend}, clock=clock)
    await scheduler.__aenter__()
    runner = await scheduler.load("m.pt2", limits=Limits(jobs=2))
    futures = [runner.submit("ab") for _ in range(3)]
    with pytest.raises(QueueFullError):
        runner.submit("ab")
    futures[2].cancel()
    clock.advance(0.25)
    await backend.step()
    await backend.step(ValueError("broken"))
    await asyncio.wait(futures)
    return scheduler


async def test_a_scrape_says_what_the_stats_say():
    scheduler = await work(ManualClock())
    samples, _ = scraped(Collector(scheduler))
    own = (("device", "cpu"), ("runner", "m"))

    def total(outcome):
        labels = tuple(sorted([*own, ("priority", "NORMAL"), ("outcome", outcome)]))
        return samples["aoti_sched_requests_total", labels]

    assert {name: total(name) for name in ("completed", "failed", "cancelled", "rejected")} == {
        "completed": 1,
        "failed": 1,
        "cancelled": 1,
        "rejected": 1,
    }
    reason = tuple(sorted([*own, ("reason", "QueueFullError")]))
    assert samples["aoti_sched_rejections_total", reason] == 1
    stats = scheduler.stats().devices["cpu"].runners["m"]
    assert samples["aoti_sched_free_slots", own] == stats.free_slots == 1
    assert samples["aoti_sched_epoch", own] == 1
    assert samples["aoti_sched_lanes", (("device", "cpu"),)] == 1
    await scheduler.terminate()


async def test_buckets_are_cumulative_and_the_last_has_all():
    scheduler = await work(ManualClock())
    samples, _ = scraped(Collector(scheduler))
    buckets = [
        (float(dict(labels)["le"]), value)
        for (name, labels), value in samples.items()
        if name == "aoti_sched_request_seconds_bucket"
    ]
    assert [bound for bound, _ in buckets] == sorted(bound for bound, _ in buckets)
    counts = [value for _, value in buckets]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1] == 1
    assert next(bound for bound, value in buckets if value) == pytest.approx(64e-6 * 2**12)
    (seconds,) = [v for (name, _), v in samples.items() if name == "aoti_sched_request_seconds_sum"]
    assert seconds == 0.25
    await scheduler.terminate()


async def test_a_closed_scheduler_gives_its_last_numbers():
    scheduler = await work(ManualClock())
    collector = Collector(scheduler)
    before, _ = scraped(collector)
    await scheduler.terminate()
    after, _ = scraped(collector)
    names = {key for key in before if key[0] == "aoti_sched_requests_total"}
    assert names
    assert {key: after[key] for key in names} == {key: before[key] for key in names}


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_loop_that_ends_during_a_scrape_gives_the_last_numbers(monkeypatch, is_closed):
    class Ending:
        """A loop that ends when it is asked."""

        asked = False

        def is_running(self):
            return not self.asked

        def call_soon_threadsafe(self, callback):
            self.asked = True
            if is_closed:
                raise RuntimeError("Event loop is closed")

    scheduler = await work(ManualClock())
    collector = Collector(scheduler)
    await scheduler.terminate()
    monkeypatch.setattr(prometheus, "PATIENCE", 0.05)
    monkeypatch.setattr(collector, "_loop", Ending())
    samples, _ = scraped(collector)
    assert ("aoti_sched_lanes", (("device", "cpu"),)) in samples


async def test_triton_names_are_there_when_they_are_asked_for():
    scheduler = await work(ManualClock())
    samples, _ = scraped(Collector(scheduler, compat="triton"))
    model = (("model", "m"), ("version", "1"))
    assert samples["nv_inference_request_success_total", model] == 1
    reasons = {
        dict(labels)["reason"]: value
        for (name, labels), value in samples.items()
        if name == "nv_inference_request_failure_total"
    }
    assert reasons == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 1}
    assert samples["nv_inference_count_total", model] == 2
    assert samples["nv_inference_request_duration_us_total", model] == 250_000
    assert not [name for name, _ in scraped(Collector(scheduler))[0] if name.startswith("nv_")]
    with pytest.raises(ConfigError, match="compat"):
        Collector(scheduler, compat="vllm")
    await scheduler.terminate()


async def test_a_scrape_of_another_thread_is_of_one_moment_and_gives_up_on_a_blocked_loop(
    monkeypatch,
):
    backend = FakeBackend({"m": len}, auto=True)
    async with Scheduler(SchedulerConfig(loop_lag=0.01), devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("m.pt2")
        await runner.run("a")
        collector = Collector(scheduler)
        samples, text = await asyncio.to_thread(scraped, collector)
        assert "aoti_sched_loop_lag_seconds_bucket" in text
        assert samples["aoti_sched_info", (("rules", scheduler.stats().rules),)] == 1
        monkeypatch.setattr(prometheus, "PATIENCE", 0.05)
        caught = []

        def late():
            try:
                scraped(collector)
            except TimeoutError as error:
                caught.append(str(error))

        thread = threading.Thread(target=late)
        thread.start()
        thread.join(60)  # the loop's thread is here
        assert caught == ["the event loop of the scheduler did not answer for 0.05 s"]


def test_a_scheduler_without_a_loop_is_collected_from_any_thread():
    with BlockingScheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        scheduler.load("m.pt2").run("abc")
        samples, _ = scraped(Collector(scheduler))
        (count,) = [v for (name, _), v in samples.items() if name == "aoti_sched_requests_total"]
        assert count == 1


@pytest.mark.parametrize("compat", [None, "triton"])
async def test_a_registry_refuses_a_second_collector(compat):
    async with Scheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(scheduler))
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            registry.register(Collector(scheduler, compat=compat))


@pytest.mark.parametrize("compat", [None, "triton"])
async def test_every_metric_is_described(compat):
    backend = FakeBackend({"m": len}, auto=True)
    async with Scheduler(SchedulerConfig(loop_lag=0.01), devices={"cpu": backend}) as scheduler:
        await (await scheduler.load("m.pt2")).run("a")
        collector = Collector(scheduler, compat=compat)
        described = {(one.name, one.type) for one in collector.describe()}
        assert described == {(one.name, one.type) for one in collector.collect()}
        triton = [name for name, _ in described if name.startswith("nv_inference_")]
        assert bool(triton) == (compat == "triton")


async def test_registering_takes_no_snapshot(monkeypatch):
    async with Scheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        taken = []
        monkeypatch.setattr(scheduler, "stats", lambda: taken.append("a snapshot"))
        prometheus_client.CollectorRegistry().register(Collector(scheduler))
        assert not taken


@pytest.mark.parametrize("scheduler", [None, "serving", Scheduler])
def test_a_collector_is_of_a_scheduler(scheduler):
    with pytest.raises(ConfigError, match="expected a Scheduler or a BlockingScheduler, got "):
        Collector(scheduler)


# --- Prometheus itself ----------------------------------------------------------------------------

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)


@needs_promtool
async def test_promtool_finds_nothing_to_complain_of():
    scheduler = await work(ManualClock())
    _, text = scraped(Collector(scheduler))
    await scheduler.terminate()
    checked = await asyncio.to_thread(
        subprocess.run,
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@needs_prometheus
def test_a_prometheus_server_scrapes_a_process(tmp_path):
    registry = prometheus_client.CollectorRegistry()
    with BlockingScheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        runner = scheduler.load("m.pt2")
        for _ in range(7):
            runner.run("abc")
        registry.register(Collector(scheduler))
        with prometheus_server(registry, tmp_path) as server:
            found = server.ask("sum(aoti_sched_requests_total)")
    assert found == [({}, "7")]


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    monkeypatch.delitem(sys.modules, "aoti_sched.exporters.prometheus")
    with pytest.raises(
        ModuleNotFoundError,
        match=r"needs the extra metrics\. Run: pip install 'aoti_sched\[metrics\]'",
    ):
        importlib.import_module("aoti_sched.exporters.prometheus")
