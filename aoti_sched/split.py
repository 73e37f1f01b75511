"""Split: one name over several runners, for canaries and shadow traffic.

A split has the face of a runner: `run`, `submit`, `run_blocking`, `options`. The rule by which a
request goes to one of the runners is in `queue/selection/shares.py`. The runners stay as they are,
and can be called beside the split.
"""

from __future__ import annotations

import math
import numbers
from asyncio import _get_running_loop
from collections.abc import Hashable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.errors import AotiSchedError, ConfigError, UnsupportedLoopError, brief
from aoti_sched.events import log
from aoti_sched.handle import CallOfThread, call_of_thread, must_leave_a_slot
from aoti_sched.mapping import MapResults
from aoti_sched.queue.job import Priority
from aoti_sched.queue.selection.shares import Shares
from aoti_sched.stats import ShadowStats, SplitStats

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from aoti_sched.engine.future import RunFuture
    from aoti_sched.mapping import OnError
    from aoti_sched.runner import Runner, RunnerView


class SplitView:
    """A split with other options, made by `options()`."""

    __slots__ = ("_given", "_handles", "_key", "_traffic")

    def __init__(self, traffic: Traffic, given: dict[str, Any]) -> None:
        self._traffic = traffic
        self._given = given
        self._key = _key_of(given) if traffic.sticky else None
        self._handles: dict[Runner[..., Any], RunnerView[..., Any]] = {}

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model of one of the runners, as `Runner.run` does; raises as it does."""
        return await self._submit(args, kwargs, waits=True)

    def submit(self, *args: Any, **kwargs: Any) -> RunFuture[Any]:
        """Queue a run on one of the runners, as `Runner.submit` does; raises as it does.

        `trace.runner` of the future names the runner.
        """
        return self._submit(args, kwargs, waits=False)

    def run_blocking(self, *args: Any, **kwargs: Any) -> Any:
        """`run` for callers in other threads, as `Runner.run_blocking`; raises as it does."""
        call = call_of_split(self, args, kwargs, waits=True)
        if _get_running_loop() is call.calls.loop:
            raise UnsupportedLoopError(
                f"split {self._traffic.name!r}: run_blocking() was called on the event loop's own "
                "thread and would wait for itself. Use `await split.run(...)` there."
            )
        return call.run()

    def map(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: OnError = "raise",
        unpack: bool = False,
    ) -> MapResults[Any]:
        """Run the model on each item of a source, as `Runner.map` does; raises as it does."""
        return MapResults(
            self.submit,
            source,
            call_of_split(self, (), {}, waits=False).calls.loop,
            at_once=at_once,
            ordered=ordered,
            errors=errors,
            unpack=unpack,
        )

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
        tag: str | None = None,
        copy: bool | None = None,
    ) -> SplitView:
        """Return a light handle with other options. What is not given stays as it is here.

        Args:
            priority: As in `Runner.options`.
            timeout: As in `Runner.options`.
            tenant: As in `Runner.options`. In a sticky split, all requests of a tenant go to one
                runner; a tenant is then known by its `repr`.
            tag: As in `Runner.options`.
            copy: As in `Runner.options`.

        Raises:
            ConfigError: A value is of the wrong type or out of range; it is a ValueError.
            TypeError: The tenant can't be hashed.
        """
        given: dict[str, Any] = dict(self._given)
        news = {"priority": priority, "tag": tag, "copy": copy}
        given |= {name: value for name, value in news.items() if value is not None}
        if timeout is not msgspec.UNSET:
            given["timeout"] = timeout
        if tenant is not msgspec.UNSET:
            given["tenant"] = tenant
        view = SplitView(self._traffic, given)
        view._any()  # raises for options that are wrong
        return view

    def _submit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, waits: bool
    ) -> RunFuture[Any]:
        traffic = self._traffic
        runner = traffic.next(self._key)
        handle = self._handle(runner)
        if waits:
            must_leave_a_slot(handle)
        future = handle.submit(*args, **kwargs)
        traffic.requests[runner.name] += 1
        for shadow in traffic.shadows:
            shadow.follow(future, args, kwargs)
        return future

    def _handle(self, runner: Runner[..., Any]) -> RunnerView[..., Any]:
        if not self._given:
            return runner
        handle = self._handles.get(runner)
        if handle is None:
            if len(self._handles) >= len(self._traffic.runners):  # one of them has left the split
                self._handles = {}
            handle = self._handles[runner] = runner.options(**self._given)
        return handle

    def _any(self) -> RunnerView[..., Any]:
        return self._handle(next(iter(self._traffic.runners.values())))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._traffic.name!r} of {self._traffic.shares}>"


class Split(SplitView):
    """Requests shared out among runners. Made by `Scheduler.split`."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._traffic.name

    @property
    def shares(self) -> dict[str, float]:
        """The part of the requests that each runner gets, by the runner's name; they sum up to 1.

        A runner that gets none is left out.
        """
        return dict(self._traffic.shares)

    def change(self, shares: Mapping[Runner[..., Any], float]) -> None:
        """Share out the requests from now on in another way, among these runners or others.

        Requests that are queued stay where they are. In a sticky split, only those tenants move to
        another runner that the new shares make move.

        Args:
            shares: The share of each runner, 0 or more; only their proportions count.

        Raises:
            ConfigError: A share is no such number, or all are 0.
            RunnerClosedError: A runner is closed, or belongs to another scheduler.
        """
        self._traffic.change("change", shares)

    def shadow(
        self,
        runner: Runner[..., Any],
        on_result: Callable[[RunFuture[Any], RunFuture[Any]], object],
        *,
        share: float = 1.0,
        priority: Priority = Priority.LOW,
    ) -> Shadow:
        """Send copies of the requests to one more runner, and compare the answers.

        Inputs are copied, too. The answer of a copy goes to `on_result` alone. A copy that the
        runner does not take (its queue is full, say) is counted and dropped, and never delays or
        fails the request itself.

        Args:
            runner: Gets the copies.
            on_result: Called on the event loop with the future of the request and that of its copy
                when both are done. When it raises, the error is logged and the shadow ends.
            share: The part of the requests that is copied, above 0 and at most 1.
            priority: The class of the copies.

        Raises:
            ConfigError: `share` or `priority` is wrong.
            RunnerClosedError: The runner is closed, or belongs to another scheduler.
        """
        part = _share("shadow(share=)", share)
        if not 0.0 < part <= 1.0:
            raise ConfigError(f"shadow(share=): expected above 0 and at most 1, got {part}.")
        traffic = self._traffic
        traffic.must_own([runner])
        # The inputs belong to the caller again when the request ends, perhaps before its copy runs.
        handle = runner.options(priority=priority, copy=True)
        shadow = Shadow(traffic, runner, handle, on_result, part)
        traffic.shadows = (*traffic.shadows, shadow)
        return shadow

    def stats(self) -> SplitStats:
        """Return how many requests went to each runner, and what became of the copies."""
        traffic = self._traffic
        return SplitStats(
            name=traffic.name,
            shares=dict(traffic.shares),
            requests=dict(traffic.requests),
            shadows=tuple(shadow.stats() for shadow in traffic.shadows),
        )


class Shadow:
    """Copies of a split's requests, sent to one more runner. Made by `Split.shadow`."""

    __slots__ = ("_copied", "_dropped", "_handle", "_on_result", "_shares", "_traffic", "name")

    def __init__(
        self,
        traffic: Traffic,
        runner: Runner[..., Any],
        handle: RunnerView[..., Any],
        on_result: Callable[[RunFuture[Any], RunFuture[Any]], object],
        share: float,
    ) -> None:
        self.name = runner.name
        self._traffic = traffic
        self._handle = handle
        self._on_result = on_result
        self._shares = Shares({"copied": share, "left": 1.0 - share})
        self._copied = self._dropped = 0

    def close(self) -> None:
        """Copy no more requests. Copies under way go on. Closing twice does nothing."""
        traffic = self._traffic
        traffic.shadows = tuple(one for one in traffic.shadows if one is not self)

    def stats(self) -> ShadowStats:
        """Return what became of the copies so far."""
        return ShadowStats(runner=self.name, copied=self._copied, dropped=self._dropped)

    def follow(self, future: RunFuture[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Send a copy of a request, where it is its turn."""
        if self._shares.next() != "copied":
            return
        try:
            copy = self._handle.submit(*args, **kwargs)
        except AotiSchedError:
            self._dropped += 1
            return
        self._copied += 1
        left = 2

        def done(_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                self._tell(future, copy)

        future.add_done_callback(done)
        copy.add_done_callback(done)

    def _tell(self, future: RunFuture[Any], copy: RunFuture[Any]) -> None:
        if not copy.cancelled():
            copy.exception()  # the callback may not look at it
        try:
            self._on_result(future, copy)
        except Exception as error:  # noqa: BLE001 -- it is the user's, and no request's
            log.error(
                "shadow ended: its callback failed",
                split=self._traffic.name,
                runner=self.name,
                error=error,
                exc_info=error,
            )
            self.close()


class Traffic:
    """What the views of one split share.

    Args:
        name: The split's name.
        must_own: Raises RunnerClosedError for a runner that is not open in the scheduler.
        shares: The share of each runner.
        sticky: Whether all requests of a tenant go to one runner.
    """

    def __init__(
        self,
        name: str,
        must_own: Callable[[Iterable[Runner[..., Any]]], None],
        shares: Mapping[Runner[..., Any], float],
        *,
        sticky: bool,
    ) -> None:
        self.name = name
        self.must_own = must_own
        self.sticky = sticky
        self.shadows: tuple[Shadow, ...] = ()
        self.requests: dict[str, int] = {}
        self.runners: dict[str, Runner[..., Any]] = {}
        self.shares: dict[str, float] = {}
        self.change("split", shares)

    def change(self, call: str, shares: Mapping[Runner[..., Any], float]) -> None:
        """Share out the requests from now on in this way; raises as `Split.change` does.

        Args:
            call: The user's call, for errors.
            shares: The share of each runner.
        """
        if not isinstance(shares, Mapping) or not shares:
            raise ConfigError(
                f"{call}({self.name!r}): expected a mapping of runners to shares, got "
                f"{brief(shares)}."
            )
        self.must_own(list(shares))
        parts = {
            runner.name: _share(f"{call}({self.name!r}): the share of {runner.name!r}", share)
            for runner, share in shares.items()
        }
        whole = sum(parts.values())
        if not whole > 0.0:
            raise ConfigError(f"{call}({self.name!r}): all shares are 0. Give a runner a share.")
        self.runners = {runner.name: runner for runner in shares if parts[runner.name] > 0.0}
        for runner_name in parts:
            self.requests.setdefault(runner_name, 0)
        self.shares = {name: part / whole for name, part in parts.items() if part > 0.0}
        self._choice = Shares(parts)

    def next(self, key: str | None) -> Runner[..., Any]:
        """Choose the runner of a request."""
        choice = self._choice
        return self.runners[choice.next() if key is None else choice.of(key)]


def call_of_split(
    view: SplitView, args: tuple[Any, ...], kwargs: dict[str, Any], *, waits: bool
) -> CallOfThread:
    """Return how another thread hands a request over, as `call_of_thread`."""
    traffic = view._traffic  # noqa: SLF001
    calls = [
        call_of_thread(runner, args, kwargs, waits=waits) for runner in traffic.runners.values()
    ]

    def submit(left: float | None) -> RunFuture[Any]:
        mine = view if left is None else view.options(timeout=left)
        return mine._submit(args, kwargs, waits=waits)  # noqa: SLF001

    def inherit_streams() -> AbstractContextManager[object]:
        return _entered([call.inherit_stream() for call in calls])

    timeout = call_of_thread(view._any(), args, kwargs, waits=waits).timeout  # noqa: SLF001
    return CallOfThread(calls[0].calls, traffic.name, submit, inherit_streams, timeout)


@contextmanager
def _entered(contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _share(what: str, value: object) -> float:
    number = None if isinstance(value, bool) else value
    if not isinstance(number, numbers.Real) or not 0.0 <= float(number) < math.inf:
        raise ConfigError(f"{what}: expected a number, 0 or more, got {brief(value)}.")
    return float(number)


def _key_of(given: dict[str, Any]) -> str | None:
    tenant = given.get("tenant")
    return None if tenant is None else repr(tenant)
