"""Dispatcher: connects one device's queue with its executor, on one event loop.

Facts go into the queue; the commands that come out are performed here: works are handed to lanes,
futures are resolved, timers are set. There is no rule in this file.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from aoti_sched.backends.contracts import Completion, Executor, Work
from aoti_sched.backends.executors.batches import Batch
from aoti_sched.engine.numbers import device_stats, runner_stats
from aoti_sched.engine.observers import Observers, going_on
from aoti_sched.engine.request import deadline_error
from aoti_sched.engine.traces import name_of, tag_of
from aoti_sched.errors import AotiSchedError, DeviceLostError
from aoti_sched.events import Held, MemoryUse, Pause, log
from aoti_sched.foreign import out_of_resources, said
from aoti_sched.queue.commands import (
    BarrierReached,
    Claimed,
    Command,
    Drained,
    Expire,
    Failing,
    GoOn,
    Grant,
    Launch,
    NextTurn,
    Park,
    Reject,
    Return,
    Revoke,
    Shed,
    Turn,
    WakeAt,
    Withdraw,
)
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import Job, JobState
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    from aoti_sched.engine.request import Request
    from aoti_sched.queue.runner_state import Lease, RunnerState
    from aoti_sched.stats import DeviceStats, RunnerStats


class Timer(Protocol):
    """What `Clock.call_at` returns."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The scheduler's time, in seconds. Neither method raises.

    Tests bring a clock of their own (`aoti_sched.testing.ManualClock`).
    """

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer: ...


class LoopClock:
    """`time.monotonic`, which the lanes' stamps use too, and the event loop's timers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.time = time.monotonic

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        return self._loop.call_later(max(0.0, when - time.monotonic()), callback)


class Dispatcher:
    """Performs the commands of one `DeviceQueue` on one `Executor`.

    Attributes:
        observers: The scheduler's observers; None while there are none.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        queue: DeviceQueue,
        executor: Executor,
        *,
        log_requests: bool,
        slow: float | None,
        on_failing: Callable[[RunnerState], None],
        on_lost: Callable[[str, DeviceLostError], None],
        on_park: Callable[[RunnerState], None],
        on_return: Callable[[RunnerState], None],
    ) -> None:
        self.queue = queue
        self.executor = executor
        self.loop = loop
        self._clock = clock
        self._time = clock.time
        self._log_requests = log_requests
        self._slow = math.inf if slow is None else slow
        self._watches = log_requests or slow is not None
        self._on_failing = on_failing
        self._on_lost = on_lost
        self._on_park = on_park
        self._on_return = on_return
        self._timer: Timer | None = None
        self._wake = 0.0
        self._drained: dict[str, asyncio.Future[None]] = {}
        self._reached: dict[str, asyncio.Future[None]] = {}
        self._moves: dict[str, Callable[[Job], None]] = {}
        self.on_turn: dict[str, Callable[[], None]] = {}  # exchanges the weights of a runner
        self._removed: dict[str, RunnerStats] | None = None
        self.observers: Observers | None = None
        self._closed_barriers: dict[str, float] = {}
        loop.add_reader(executor.fileno(), self._collect)

    def deadline(self, timeout: float) -> float:
        """Return the point on the scheduler's clock that lies `timeout` seconds from now."""
        return self._time() + timeout

    def now(self) -> float:
        """Return the time on the scheduler's clock."""
        return self._time()

    def tell(
        self, fact: Callable[[RunnerState, float], list[Command]], runner: RunnerState
    ) -> None:
        """Let a fact about a runner happen now."""
        self.perform(fact(runner, self._time()))

    def submit(self, job: Job, *, wait: bool) -> None:
        """Queue a new job, whose `payload` is its future. Raises the error of a rejected job."""
        if self.observers is not None:
            self.observers.submitted(job.payload)
        try:
            self.perform(self.queue.submit(job, self._time(), wait=wait))
        except AotiSchedError as error:
            # The frames of the traceback hold the error: a cycle with the inputs.
            raise error.with_traceback(None)  # noqa: B904

    def withdraw(self, runner: RunnerState, move: Callable[[Job], None]) -> int:
        """Take out the queued jobs, and `move` each of them. Their callers wait on.

        Some jobs are moved at once, the others in the next iterations of the loop.

        Returns:
            The number of jobs.
        """
        count = runner.withdrawable
        self.moves(runner, move)
        self.perform(self.queue.withdraw(runner, self._time()))
        return count

    def moves(self, runner: RunnerState, move: Callable[[Job], None]) -> None:
        """Let `move` submit the jobs that are withdrawn from a runner."""
        self._moves[runner.name] = move

    def resubmit(self, job: Job, since: float) -> None:
        """Queue a job in the place of one that was withdrawn at another replica.

        The caller waits already, and gets the error of a rejected job.
        """
        future = job.payload
        try:
            self.perform(self.queue.submit(job, self._time(), wait=True, since=since))
        except AotiSchedError as error:
            future._refuse(error)

    def cancel(self, job: Job) -> None:
        """Cancel a job whose future the caller has cancelled."""
        if job.state <= JobState.RUNNING:
            future, job.payload = job.payload, None
            self.perform(self.queue.cancel(job, self._time()))
            if self._watches and job.slot < 0:  # what runs is logged when it has ended
                self._log_job(job, future)
            if self.observers is not None:
                self.observers.ended(job, self.queue, future)

    def going_on(self) -> list[Any]:
        """Return the runs, leases and pauses that have begun and not ended."""
        return list(going_on(self.queue, self._closed_barriers))

    def release(self, lease: Lease) -> None:
        if self.observers is not None and not lease.released:
            name, now = self.queue.name, self._time()
            self.observers.tell(
                Held(name, name_of(self.queue, lease), lease.slot, lease.granted, now)
            )
        self.perform(self.queue.release(lease, self._time()))

    def drain(self, runner: RunnerState, *, terminate: bool) -> asyncio.Future[None]:
        """Begin to drain (or terminate) a runner. The future is done when nothing is left."""
        drained = self._drained.get(runner.name) or self.loop.create_future()
        if runner.phase is Phase.DRAINED:
            if not drained.done():
                drained.set_result(None)
            return drained
        self._drained[runner.name] = drained
        fact = self.queue.terminate_runner if terminate else self.queue.drain_runner
        self.perform(fact(runner, self._time()))
        return drained

    def remove(self, runner: RunnerState) -> None:
        if self.queue.runners.get(runner.name) is runner:
            if self._removed is not None:
                self._removed[runner.name] = self.runner_stats(runner)
            self.queue.remove_runner(runner)
        for records in (self._drained, self._moves, self.on_turn):
            records.pop(runner.name, None)

    def keep_numbers(self) -> None:
        """Keep the numbers of runners that are removed from now on: the scheduler closes."""
        if self._removed is None:
            self._removed = {}

    def close_barrier(self, runner: RunnerState, *, abort: bool) -> asyncio.Future[None]:
        """Hold back the queued jobs. The future is done when every slot of the runner is free."""
        reached = self._reached[runner.name] = self.loop.create_future()
        self._closed_barriers[runner.name] = self._time()
        self.perform(self.queue.close_barrier(runner, self._time(), abort=abort))
        return reached

    def open_barrier(self, runner: RunnerState, epoch: int | None) -> None:
        """Let the runner go on; with `epoch`, on other constants."""
        self._reached.pop(runner.name, None)
        now, before = self._time(), runner.epoch
        closed = self._closed_barriers.pop(runner.name, now)
        self.perform(self.queue.open_barrier(runner, now, epoch=epoch))
        if self.observers is not None:
            new = runner.epoch
            self.observers.tell(
                Pause(self.queue.name, name_of(self.queue, runner), closed, now, new, new != before)
            )

    # --- memory ----------------------------------------------------------------------------------

    def claim(self, holding: Holding, size: int) -> Claim:
        """Reserve `size` bytes of memory. The claim's payload is a future that is done then.

        Raises:
            MemoryLimitError: There is no room, even if all idle models are evicted.
        """
        claim = Claim(holding, size, self.loop.create_future())
        self.perform(self.queue.claim(claim, self._time()))
        return claim

    def give_up(self, claim: Claim) -> None:
        self.perform(self.queue.give_up(claim, self._time()))

    def settle(
        self, holding: Holding, *, constants: int, inactive: int = 0, fixed: str = ""
    ) -> None:
        """Record a model's actual memory use. `fixed` says why it can't be evicted, if it can't."""
        now = self._time()
        self.perform(
            self.queue.update_use(holding, now, constants=constants, inactive=inactive, fixed=fixed)
        )
        self._tell_memory(holding, "measured")

    def forget(self, holding: Holding) -> None:
        self.perform(self.queue.release_memory(holding, self._time()))
        self._tell_memory(holding, "freed")

    def _tell_memory(self, holding: Holding, change: str) -> None:
        if self.observers is not None:
            memory, now = self.queue.memory, self._time()
            size = memory.of(holding)
            self.observers.tell(
                MemoryUse(self.queue.name, holding.name, change, now, size, memory.used)
            )

    def call_back(self, runner: RunnerState) -> None:
        """Restore the runner's weights. Raises MemoryLimitError if there is no room for them."""
        self.perform(self.queue.call_back(runner, self._time()))

    def residency_change(self, runner: RunnerState) -> asyncio.Future[BaseException | None]:
        """Return a future that is done when weights under way are evicted or restored.

        Its result is the error of weights that could not be restored, otherwise None.
        """
        holding = runner.memory
        if holding.payload is None:
            holding.payload = self.loop.create_future()
        future: asyncio.Future[BaseException | None] = holding.payload
        return future

    def parked(self, runner: RunnerState) -> None:
        holding = runner.memory
        future, holding.payload = holding.payload, None
        self.perform(self.queue.parked(runner, self._time()))
        self._tell_memory(holding, "evicted")
        if future is not None:
            future.set_result(None)

    def returned(self, runner: RunnerState, error: BaseException | None) -> None:
        holding = runner.memory
        future, holding.payload = holding.payload, None
        self.perform(
            self.queue.returned(runner, self._time(), error="" if error is None else said(error))
        )
        self._tell_memory(holding, "restored" if error is None else "not restored")
        if future is not None:
            future.set_result(error)

    def close(self) -> None:
        """Stop listening. The executor is closed elsewhere, since that blocks."""
        if self.observers is not None:
            self.observers.flush()
            self.observers = None
        self.loop.remove_reader(self.executor.fileno())
        if self._timer is not None:
            self._timer.cancel()

    def runner_stats(self, runner: RunnerState) -> RunnerStats:
        """Return a runner's numbers, with those of its second record (`queue/weight_turns.py`)."""
        return runner_stats(self.queue, runner)

    def stats(self) -> DeviceStats:
        """Return the device's numbers, those of runners removed since `keep_numbers` included."""
        return device_stats(self.queue, self.executor, self._removed or {})

    # --- the way back ----------------------------------------------------------------------------

    def _collect(self) -> None:
        """The executor's descriptor is readable: hand each completion to the queue."""
        now = self._time()
        fault: BaseException | None = None
        for completion in self.executor.drain():
            token, error = completion.token, completion.error
            try:
                if error is not None:
                    self._see_loss(error)  # before queued jobs are launched there
                # The next launches come first: lanes should not wait.
                self.perform(self._complete(completion, token, error is None, now))
            except BaseException as raised:  # noqa: BLE001 -- the other completions go on
                fault = fault or raised
            self._settle(token, error, completion.outputs)
        if fault is not None:
            raise fault

    def _poll(self) -> None:
        """Collect a run that may end sooner than the loop could fall asleep and be woken.

        The other callbacks of this iteration of the loop were called before.
        """
        if self.executor.poll():
            self._collect()

    def _complete(self, completion: Completion, token: Any, ok: bool, now: float) -> list[Command]:
        started, finished = completion.started, completion.finished
        job, size = (token[0], len(token)) if type(token) is tuple else (token, 1)
        if self.observers is not None:
            self.observers.ran(job, self.queue, size, started, finished, now, ok)
        return self.queue.complete(job, now, ok=ok, started=started, finished=finished)

    def _settle(self, token: Any, error: BaseException | None, outputs: list[Any] | None) -> None:
        """Tell the caller, or all callers of a batch, how the run ended."""
        if error is not None:
            self._log_failure(token, error)
        if type(token) is not tuple:
            self._settle_job(token, error, outputs)
        elif error is None:
            for job, own in zip(token, outputs or (), strict=True):
                self._settle_job(job, None, own)
        else:
            for job in token:
                if job.state is not JobState.RUNNING:  # otherwise it is run again, by itself
                    self._settle_job(job, error, None)

    def _log_failure(self, token: Any, error: BaseException) -> None:
        jobs = token if type(token) is tuple else (token,)
        tags = [tag for tag in map(tag_of, [job.payload for job in jobs]) if tag]
        values: dict[str, Any] = {
            "runner": jobs[0].source.name,
            "device": self.queue.name,
            "job": jobs[0].id,
            "batch_size": len(jobs),
            "error": error,
        }
        if tags:
            values["tags"] = tags
        if len(jobs) == 1:
            self._add_of_observers(values, jobs[0].payload)
        log.warning("run failed", **values)

    def _settle_job(self, job: Job, error: BaseException | None, outputs: list[Any] | None) -> None:
        future, job.payload = job.payload, None
        if future is not None and not future.done():
            if error is None:
                future._deliver(outputs or [])
            else:
                future._refuse(error)
        if self._watches:
            self._log_job(job, future)
        if self.observers is not None and future is not None:
            self.observers.ended(job, self.queue, future)

    def perform(self, commands: list[Command]) -> None:
        """Perform all commands of a fact. The first error of a command is raised at the end."""
        fault: BaseException | None = None
        # The commands that follow from a run that ends at once join the end of the list.
        for command in commands:
            if type(command) is not Launch:
                try:
                    self._perform_other(command)
                except BaseException as error:  # noqa: BLE001
                    fault = fault or error
                continue
            job = command.job
            work = _work(job)
            try:
                if job.inline:
                    completion = self.executor.run_here(work)
                else:
                    if self.executor.submit(job.lane, work):
                        self.loop.call_soon(self._poll)
                    continue
            except BaseException as error:  # noqa: BLE001 -- the request fails
                now = self._time()
                ours = out_of_resources(error, "the run") or error
                completion = Completion(work.token, None, ours, now, now)
            token, failed = completion.token, completion.error
            if failed is not None:
                self._see_loss(failed)
            commands += self._complete(completion, token, failed is None, self._time())
            self._settle(token, failed, completion.outputs)
        if fault is not None:
            raise fault

    def _see_loss(self, error: BaseException) -> None:
        if isinstance(error, DeviceLostError):
            self._on_lost(self.queue.name, error)

    def _perform_other(self, command: Command) -> None:
        match command:
            case Expire(job=job, takes=takes):
                self._fail(job, deadline_error(job, takes))
            case Grant(job=job, lease=lease):
                future, job.payload, lease.holder = job.payload, None, None
                future.set_result(lease)
                if self.observers is not None:
                    self.observers.ended(job, self.queue, future)
            case Revoke(job=job, error=error) | Shed(job=job, error=error):
                self._fail(job, error)
            case Failing(runner=runner):
                self._on_failing(runner)
            case WakeAt(at=at):
                if self._timer is not None:
                    if self._wake <= at:  # asked for by a fact in the midst of these commands
                        return
                    self._timer.cancel()
                self._wake = at
                self._timer = self._clock.call_at(at, self._tick)
            case NextTurn():
                self.loop.call_soon(self._turn)
            case GoOn():
                self.loop.call_soon(self._go_on)
            case Withdraw(job=job):
                self._moves[job.source.name](job)
            case BarrierReached(runner=runner):
                reached = self._reached[runner.name]
                if not reached.done():  # the waiting caller may have given up
                    reached.set_result(None)
            case Drained(runner=runner):
                drained = self._drained.get(runner.name)
                if drained is not None and not drained.done():
                    drained.set_result(None)
            case Claimed(claim=claim):
                if not claim.payload.done():  # the caller may have given up
                    claim.payload.set_result(None)
            case Park(runner=runner):
                self._on_park(runner)
            case Return(runner=runner):
                self._on_return(runner)
            case Turn(runner=runner):
                self.on_turn[runner.name]()
            case Reject(job=job, error=error):
                future, job.payload = job.payload, None
                if self.observers is not None:
                    self.observers.ended(job, self.queue, future)
                raise error
            case _:
                raise TypeError(f"the queue gave an unknown command {command!r}")

    def _fail(self, job: Job, error: Exception) -> None:
        future, job.payload = job.payload, None
        if future is not None and not future.done():
            future._refuse(error)
        if self._watches:
            self._log_job(job, future)
        if self.observers is not None and future is not None:
            self.observers.ended(job, self.queue, future)

    def _tick(self) -> None:
        self._timer = None
        self.perform(self.queue.tick(self._time()))

    def _turn(self) -> None:
        self.perform(self.queue.turn(self._time()))

    def _go_on(self) -> None:
        self.perform(self.queue.go_on(self._time()))

    def _log_job(self, job: Job, future: object) -> None:
        """Log a request that has ended, where requests or slow ones are logged."""
        ended = job.finished or self._time()
        seconds = ended - job.submitted
        if seconds >= self._slow:
            level, event = log.warning, "slow request"
        elif self._log_requests:
            level, event = log.info, "request"
        else:
            return
        values: dict[str, Any] = {
            "runner": job.source.name,
            "device": self.queue.name,
            "job": job.id,
            "state": job.state.name,
            "placement": "inline" if job.inline else "lane",
            "epoch": job.epoch,
            "batch_size": job.batch,
            "seconds": round(seconds, 6),
            "queue_seconds": round(job.started - job.submitted, 6) if job.started else None,
            "run_seconds": round(job.finished - job.started, 6) if job.started else None,
        }
        if tag := tag_of(future):
            values["tag"] = tag
        self._add_of_observers(values, future)
        level(event, **values)

    def _add_of_observers(self, values: dict[str, Any], future: object) -> None:
        """Add what observers say of a caller to an event's values, which stay as they are."""
        if self.observers is not None:
            for name, value in self.observers.log_values(future).items():
                values.setdefault(name, value)


def _work(job: Job) -> Work:
    """Return the work of a launched job and of all jobs that run with it.

    The token of a batch is the tuple of its jobs, the leader first.
    """
    request: Request = job.payload
    replica = request._replica
    layout = replica.batch_layout
    if layout is None or (not job.members and layout.padded(job.rows) == job.rows):
        inputs, request._inputs = request._inputs, ()  # from now on the lane alone keeps them alive
        return Work(replica.container, inputs, replica.threads, job, slot=job.slot)
    jobs = job.members or (job,)
    rows = [member.rows for member in jobs]
    members = [member.payload._inputs for member in jobs]
    batch = Batch(layout.plan, members, rows, layout.padded(sum(rows)), job.slot)
    return Work(replica.container, (), replica.threads, jobs, batch, job.slot)
