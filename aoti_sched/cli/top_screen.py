"""The screen of `aoti-sched top`: a textual application over the reports of one process."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Sparkline, Static

from aoti_sched.cli.failures import INTERRUPTED
from aoti_sched.cli.processes import ask, choose
from aoti_sched.cli.rates import History, RunnerRow
from aoti_sched.cli.units import size_text, time_text
from aoti_sched.errors import AotiSchedError, ExposeError, readable
from aoti_sched.expose.reports import StatsReport
from aoti_sched.stats import DeviceStats

COLUMNS = (
    *("runner", "device", "rate", "errors", "queued", "running", "p50", "p99", "batch"),
    *("epoch", "memory", "state", "history"),
)
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 16
"""Values in the history of a row."""


class Top(App[None]):
    """Watches one process.

    Args:
        wanted: The process, as the commands take it; None for that of the report. After its end, a
            successor with its name takes its place.
        first: Its first report.
        interval: Seconds between two looks.
    """

    TITLE = "aoti-sched top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { text-style: bold; padding: 0 1; }
    #devices { padding: 0 1; margin: 1 0; height: auto; }
    #total { height: 2; margin: 0 1 1 1; }
    #total.empty { display: none; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "interrupt", "Interrupt", show=False, priority=True),
        Binding("s", "next_column", "Sort by the next column"),
        Binding("r", "reverse", "Reverse"),
        Binding("p", "pause", "Pause"),
    ]

    def __init__(self, wanted: str | None, first: StatsReport, interval: float) -> None:
        super().__init__()
        self._wanted = wanted or f"{first.pid}-{first.name}"
        self._interval = interval
        self._history = History()
        self._history.add(first)
        self._problem = ""
        self._paused = False
        self.sorted_by = "rate"
        self.descending = True

    def compose(self) -> ComposeResult:
        """Yield the widgets from top to bottom."""
        yield Static(id="title", markup=False)
        yield Static(id="devices", markup=False)
        yield Sparkline(id="total")
        yield DataTable(cursor_type="row")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.show()
        self.run_worker(self._look(), exclusive=True)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                report = await asyncio.to_thread(self._ask)
            except AotiSchedError as error:
                self._problem = readable(str(error))
            else:
                self._problem = ""
                self._history.add(report)
            if not self._paused:
                self.show()

    def _ask(self) -> StatsReport:
        try:
            process = choose(self._wanted)
        except ExposeError:
            process = choose(self._history.latest.name)
        return ask(process, "/stats", StatsReport)

    # --- keys ------------------------------------------------------------------------------------

    def action_interrupt(self) -> None:
        """End as an interrupted command does."""
        self.exit(return_code=INTERRUPTED)

    def action_next_column(self) -> None:
        """Sort by the column to the right."""
        self._sort_by(COLUMNS[(COLUMNS.index(self.sorted_by) + 1) % (len(COLUMNS) - 1)])

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self.descending = not self.descending
        self.show()

    def action_pause(self) -> None:
        """Show no newer numbers, or go on."""
        self._paused = not self._paused
        self.show()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by the column whose heading was clicked; a second click turns the order."""
        name = COLUMNS[event.column_index]
        if name == self.sorted_by:
            self.action_reverse()
        elif name != "history":
            self._sort_by(name)

    def _sort_by(self, name: str) -> None:
        self.sorted_by = name
        self.descending = name not in ("runner", "device", "state")
        self.show()

    # --- drawing ---------------------------------------------------------------------------------

    def show(self) -> None:
        """Draw the newest report."""
        report = self._history.latest
        state = f"  {self._problem}" if self._problem else "  paused" if self._paused else ""
        self.query_one("#title", Static).update(
            f"{report.name}  process {report.pid}  exposed for {time_text(report.uptime)}{state}"
        )
        devices = report.stats.devices.values()
        self.query_one("#devices", Static).update("\n".join(map(_device_line, devices)))
        total = self.query_one("#total", Sparkline)
        total.data = self._history.total()
        total.set_class(not any(total.data), "empty")
        self._show_table(sorted(self._history.rows(), key=self._key, reverse=self.descending))

    def _show_table(self, rows: list[RunnerRow]) -> None:
        table: DataTable[Any] = self.query_one(DataTable)
        row = table.cursor_row
        table.clear(columns=True)
        for name in COLUMNS:
            arrow = ("↓" if self.descending else "↑") if name == self.sorted_by else ""
            table.add_column(f"{name}{arrow}", key=name)
        for each in rows:
            table.add_row(*_cells(each), key=f"{each.device}/{each.runner}")
        table.move_cursor(row=row)

    def _key(self, row: RunnerRow) -> Any:
        value = getattr(row, self.sorted_by)
        return (value is not None, value if value is not None else 0.0)


def _cells(row: RunnerRow) -> list[Text]:
    def right(text: str) -> Text:
        return Text(text, justify="right")

    bad = row.state not in ("ok", "parked", "updating")
    return [
        Text(readable(row.runner)),
        Text(row.device),
        right(f"{row.rate:,.1f}/s"),
        Text(f"{row.errors:,.1f}/s", style="red" if row.errors else "", justify="right"),
        right(f"{row.queued:,}"),
        right(f"{row.running:,}"),
        right("-" if row.p50 is None else time_text(row.p50)),
        right("-" if row.p99 is None else time_text(row.p99)),
        right("-" if row.batch is None else f"{row.batch:.1f}"),
        right(str(row.epoch)),
        right(size_text(row.memory)),
        Text(row.state, style="bold red" if bad else "green"),
        Text(sparks(row.history[-_SHOWN:]), style="cyan"),
    ]


def _device_line(device: DeviceStats) -> str:
    used = device.cores - device.free_cores
    memory = device.memory
    of = "" if memory.limit is None else f" of {size_text(memory.limit)}"
    parts = [
        f"{device.name:<8}",
        f"lanes {bar(device.busy_lanes, device.lanes)} {device.busy_lanes}/{device.lanes}",
        f"cores {bar(used, device.cores)} {used}/{device.cores}",
        f"memory {size_text(memory.used)}{of}",
        f"queued {device.queued:,}",
    ]
    return "  ".join([*parts, *([f"LOST: {readable(device.lost)}"] if device.lost else [])])


def bar(part: int, whole: int, width: int = 8) -> str:
    """Return a bar that is filled by `part` of `whole`."""
    filled = round(width * min(part, whole) / whole) if whole else 0
    return "█" * filled + "░" * (width - filled)


def sparks(values: tuple[float, ...]) -> str:
    """Return a line of bars, the highest for the largest value."""
    most = max(values, default=0.0)
    if most <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)
