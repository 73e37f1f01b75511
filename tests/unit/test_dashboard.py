"""The board for Grafana: every query names what the collector exports, and has an answer."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest

from aoti_sched import (
    BlockingScheduler,
    DeviceConfig,
    Limits,
    Priority,
    SchedulerConfig,
)
from aoti_sched.testing import FakeBackend

prometheus_client = pytest.importorskip("prometheus_client")

from aoti_sched.exporters.prometheus import Collector  # noqa: E402
from tests.unit.prometheus_server import needs_prometheus, prometheus_server  # noqa: E402

BOARD = json.loads((Path(__file__).parents[2] / "dashboards" / "grafana.json").read_text())
PANELS = BOARD["panels"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
NAME = re.compile(r"\baoti_sched_\w+")


@pytest.fixture(scope="module")
def application():
    """A scheduler of which every number exists, and the registry that it is scraped by."""
    config = SchedulerConfig(
        devices={"cpu": DeviceConfig(memory_limit=1000, evict="lru")}, loop_lag=0.05
    )
    go_on = threading.Event()
    backend = FakeBackend({"m": lambda _: go_on.wait(9)}, weights={"m": {"w": 1}}, lanes=1)
    backend.finish_all()
    with BlockingScheduler(config, devices={"cpu": backend}) as scheduler:
        runner = scheduler.load("m.pt2", limits=Limits(jobs=1))
        go_on.set()
        for priority in Priority:
            runner.options(priority=priority).run("ab")
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(scheduler))
        yield scheduler, runner, registry


def send_too_much(runner):
    """Send more than the bound allows, so that some requests are rejected."""
    futures = [runner.submit("ab") for _ in range(20)]
    return [future.exception() for future in futures]


def exported(registry):
    return {sample.name for family in registry.collect() for sample in family.samples}


def test_every_metric_of_the_board_is_exported(application):
    _, _, registry = application
    asked = {name for panel in PANELS for t in panel["targets"] for name in NAME.findall(t["expr"])}
    asked |= {
        name
        for variable in VARIABLES.values()
        for name in NAME.findall(variable.get("definition", ""))
    }
    known = exported(registry) | {"aoti_sched_rejections_total"}
    assert asked - known == set()
    assert len(asked) > 20
    # What the board leaves out, on purpose.
    left_out = {re.sub(r"_(sum|count|bucket|created)$", "", name) for name in known}
    left_out -= {re.sub(r"_(sum|count|bucket|created)$", "", name) for name in asked}
    assert left_out == {
        f"aoti_sched_{name}"
        for name in (
            *("batched_total", "batches_total", "info", "inline_total", "parked"),
            *("retried_total", "running_runs", "updating"),
        )
    }


def test_the_variables_of_the_queries_are_those_of_the_board():
    used = {name for query in QUERIES for name in re.findall(r"\$(\w+)", query.values[0])}
    assert used - {"__rate_interval"} <= {*VARIABLES}
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_no_panel_covers_another():
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in PANELS
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24, "Grafana has 24 columns"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


@pytest.fixture(scope="module")
def server(application, tmp_path_factory):
    _, runner, registry = application
    stop = threading.Event()

    def work():
        while not stop.wait(0.2):
            for priority in Priority:
                runner.options(priority=priority).run("ab")
            send_too_much(runner)

    thread = threading.Thread(target=work)
    with prometheus_server(registry, tmp_path_factory.mktemp("prometheus")) as found:
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()


@needs_prometheus
@pytest.mark.parametrize("query", QUERIES)
def test_prometheus_answers_each_query_of_the_board(server, query):
    query = query.replace("$__rate_interval", "5s")
    query = re.sub(r"\$(job|device|runner)\b", ".*", query)
    assert "$" not in query
    found = [float(value) for _, value in server.ask(query)]
    assert [value for value in found if value < 0.0] == []  # a quantile of nothing is NaN
