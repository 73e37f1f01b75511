"""`aoti-sched stats`: the numbers of a running process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import msgspec

from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import out, print_table, print_title
from aoti_sched.cli.processes import Process, ask, choose
from aoti_sched.cli.rates import requests_of_a_run, state
from aoti_sched.cli.units import size_text, time_text
from aoti_sched.expose.reports import StatsReport
from aoti_sched.stats import DeviceStats, SchedulerStats


def stats_command(process: Process = None, /, *, json: Flag = False) -> None:
    """Show the numbers of a running process: devices, runners, latencies.

    The program has to call `await scheduler.expose()`.

    Args:
        process: A process id, a name, the path of a socket, or http://127.0.0.1:PORT; it can be
            left out where only one scheduler is exposed.
        json: Print JSON.
    """
    report = ask(choose(process), "/stats", StatsReport)
    if json:
        text = msgspec.json.format(msgspec.json.encode(report), indent=2)
        sys.stdout.write(text.decode() + "\n")
        return
    console = out()
    print_title(
        console,
        f"{report.name}, process {report.pid}, exposed for {time_text(report.uptime)}",
    )
    devices = report.stats.devices.values()
    print_table(
        console,
        ("device", "lanes", "cores", "memory", "queued", "state"),
        [
            (
                device.name,
                f"{device.busy_lanes}/{device.lanes}",
                f"{device.cores - device.free_cores}/{device.cores}",
                memory_text(device),
                device.queued,
                f"lost: {device.lost}" if device.lost else "ok",
            )
            for device in devices
        ],
    )
    rows = list(_runners(report.stats))
    if rows:
        console.print()
        print_table(console, (*_HEADINGS,), rows)


_HEADINGS = (
    *("runner", "device", "state", "epoch", "queued", "running", "completed", "failed"),
    *("rejected", "p50", "p99", "run", "batch"),
)


def _runners(stats: SchedulerStats) -> Iterator[tuple[object, ...]]:
    for device in stats.devices.values():
        for runner in device.runners.values():
            total, run = runner.histogram("total"), runner.histogram("run")
            size = requests_of_a_run(None, runner)
            yield (
                runner.name,
                device.name,
                state(runner),
                runner.epoch,
                runner.queued,
                runner.running,
                runner.completed,
                runner.failed,
                runner.rejected,
                time_text(total.p50) if total.count else "-",
                time_text(total.p99) if total.count else "-",
                time_text(run.mean) if run.count else "-",
                "-" if size is None else f"{size:.1f}",
            )


def memory_text(device: DeviceStats) -> str:
    """Return what a device's weights take of what they may take."""
    memory = device.memory
    of = "" if memory.limit is None else f" of {size_text(memory.limit)}"
    return size_text(memory.used) + of
