"""Handle: what can be called. A runner, a view of a runner with other options, a lease, a session.

`run` and `submit` take exactly the model's own arguments. Scheduling options are passed separately,
with `options(...)`, which returns a light and immutable handle.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from asyncio import _get_running_loop  # the public one raises, and this one is for the hot path
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, overload

import msgspec

from aoti_sched import arguments
from aoti_sched.engine.future import RunFuture, future_of
from aoti_sched.engine.tenants import Tenant
from aoti_sched.errors import (
    AotiSchedError,
    ConfigError,
    UnsupportedLoopError,
    brief,
    readable,
)
from aoti_sched.mapping import MapResults
from aoti_sched.model.copies import copied
from aoti_sched.queue.job import Job, Priority
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Sequence

    from aoti_sched.engine.blocking import Ask, BlockingCalls, BlockingFuture
    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router
    from aoti_sched.mapping import OnError
    from aoti_sched.queue.runner_state import Source


_LONGEST_TAG = 200


class Options(msgspec.Struct, frozen=True):
    """How requests are scheduled.

    Attributes:
        priority: The class of the requests.
        timeout: Seconds for waiting, queue and run; None for no timeout.
        min_epoch: The earliest epoch that the requests run on.
        tenant: Shares the runner equally with each other tenant.
        tag: The caller's name for the requests, in traces, logs and errors; "" for none.
        copy: Whether the inputs are copied at submit.
        pinned: Whether the requests run on the weights of `min_epoch`, and no later ones.
    """

    priority: Priority = Priority.NORMAL
    timeout: float | None = None
    min_epoch: int = 0
    tenant: Tenant | None = None
    tag: str = ""
    copy: bool = False
    pinned: bool = False


class CallOfThread(NamedTuple):
    """A request of a thread other than the event loop's.

    Attributes:
        calls: The calls of other threads into the scheduler.
        name: What is called, for errors.
        submit: Submits the request on the loop, with the seconds that are left of its timeout.
        inherit_stream: Returns a context that makes the calling thread's stream current on the
            loop's thread.
        timeout: Seconds for all of it.
    """

    calls: BlockingCalls
    name: str
    submit: Callable[[float | None], RunFuture[Any]]
    inherit_stream: Callable[[], AbstractContextManager[object]]
    timeout: float | None

    def run(self) -> Any:
        """Hand the request over to the loop and wait for its end."""
        return self.calls.run(self.name, self.submit, self.inherit_stream, self.timeout)

    def start(self, ask: Ask) -> BlockingFuture[Any]:
        """Hand the request over to the loop and return its future.

        Args:
            ask: Returns a function's answer, given on the loop between two facts.
        """
        return self.calls.submit(self.name, self.submit, self.inherit_stream, self.timeout, ask)


_View = TypeVar("_View", bound="Handle[Any, ..., Any]")


class Handle(ABC, Generic[_View, P, R]):
    """What can be called.

    Type parameters: what `options()` returns, the arguments of the model, and its result.

    Args:
        router: The runner's replicas.
        replica: What is asked before a replica is chosen: the first one, or the replica of a lease.
        source: What the requests draw their slots from.
        options: How the requests are scheduled.
    """

    __slots__ = ("_options", "_replica", "_router", "_source")

    def __init__(self, router: Router, replica: Replica, source: Source, options: Options) -> None:
        self._router = router
        self._replica = replica
        self._source = source
        self._options = options

    async def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the model on the exported module's own arguments and return what the module returns.

        Raises:
            InputMismatchError: The arguments do not fit, and nothing was queued.
            QueueFullError: A bound is reached (with overflow="reject").
            ShedError: The request was queued, and dropped for a better one (with overflow="shed").
            DeadlineExceededError: The timeout passed, queued or running, or can't be met any more.
            DeadlineUnreachableError: The timeout could not be met, so the request was not queued
                (with admission="predictive").
            RunnerClosedError: The runner takes no requests any more.
            RunError: The model failed. The text is torch's root cause.
            LeaseError: This task itself holds every slot, and would wait for ever.
        """
        must_leave_a_slot(self)
        return await self.submit(*args, **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> RunFuture[R]:
        """Queue a run now and return its future.

        Raises as `run` does, except for what happens later.
        """
        options = self._options
        try:
            replica = self._replica
            source = self._source
            if _get_running_loop() is not replica.loop:
                raise wrong_loop(replica.name)
            inputs = replica.call_spec.flatten(args, kwargs)
            size = replica.input_check(inputs)
            if options.copy:
                inputs = copied(inputs)
            job = Job(source, options.priority, None, size)
            if options.tenant is not None:
                job.tenant = options.tenant
            layout = replica.batch_layout
            if layout is not None:
                job.rows, key = layout.measure(inputs)
                if source.runner is source:  # the slots of a lease are its own
                    job.key = key
                    if layout.max_tokens is not None:
                        job.tokens = layout.tokens(inputs)
            if options.timeout is not None:
                job.deadline = replica.dispatcher.deadline(options.timeout)
                job.timeout = options.timeout
            if options.min_epoch:
                job.min_epoch = options.min_epoch
                job.pinned = options.pinned
            if replica.route is not None and source is replica.state:
                replica = replica.route(job)
            captured: Sequence[Any] = inputs
            if replica.capture_stream is not None:
                captured = replica.capture_stream(inputs)
            future = future_of(replica, job, captured, options.tag)
            replica.dispatcher.submit(job, wait=replica.blocks_when_full)
            if self._router.holders.held:
                self._router.holders.watch()
        except AotiSchedError as error:
            error.tag = options.tag
            raise
        return future

    @overload
    def map(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: Literal["raise"] = "raise",
        unpack: bool = False,
    ) -> MapResults[R]: ...

    @overload
    def map(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: Literal["return"],
        unpack: bool = False,
    ) -> MapResults[R | Exception]: ...

    def map(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: OnError = "raise",
        unpack: bool = False,
    ) -> MapResults[Any]:
        """Run the model on each item of a source: `async for result in runner.map(source): ...`.

        The source is read as the results are used, never more than `at_once` items ahead. Leaving
        the loop early cancels what is queued and running.

        Args:
            source: The items. A sync source is read on the event loop, so it must not block; an
                async one is read in a task of its own.
            at_once: The most requests that are under way, or done and not yet taken.
            ordered: Yield results in the order of the source; otherwise as requests end.
            errors: What a request's error does. "raise" raises it and cancels the others. "return"
                yields it in place of the result. An error of the source is always raised, after
                the results of the items before it.
            unpack: Each item is a tuple of the positional arguments of `run`; otherwise the only
                argument.

        Raises:
            ConfigError: An argument is of the wrong type or out of range.
        """
        return MapResults(
            self.submit,
            source,
            self._replica.loop,
            at_once=at_once,
            ordered=ordered,
            errors=errors,
            unpack=unpack,
            must_not_wait=functools.partial(must_leave_a_slot, self, "map()"),
        )

    def run_blocking(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """`run` for callers in other threads: block until the result is there.

        The timeout counts from this call and fires in this thread, whatever the event loop does.
        Without a timeout, a thread waits as long as the loop runs. A thread that is interrupted
        takes its request back.

        Raises:
            RunnerClosedError: The event loop stopped, is closed, or does not run; or the scheduler
                is closed.
            UnsupportedLoopError: Called on the event loop's own thread, where it would wait for
                itself, or in a forked child.
            DeadlineExceededError: The timeout passed.
            AotiSchedError: As `run`.
        """
        router = self._router
        if _get_running_loop() is router.loop:
            raise UnsupportedLoopError(
                f"runner {router.name!r}: run_blocking() was called on the event loop's own thread "
                "and would wait for itself; use `await runner.run(...)` there"
            )

        try:
            result: R = call_of_thread(self, args, kwargs, waits=True).run()
        except AotiSchedError as error:
            error.tag = self._options.tag
            raise
        return result

    def _submission(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, waits: bool
    ) -> Callable[[float | None], RunFuture]:
        """Return what submits a request on the loop, with the seconds left of its timeout.

        `waits` says whether the thread does nothing else until the request ends.
        """

        def submit(left: float | None) -> RunFuture:
            if waits:
                must_leave_a_slot(self)
            handle: Handle[Any, ..., Any] = self if left is None else self.options(timeout=left)
            return handle.submit(*args, **kwargs)

        return submit

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        min_epoch: int | None = None,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
        tag: str | None = None,
        copy: bool | None = None,
    ) -> _View:
        """Return a light handle with other options. What is not given stays as it is here.

        Args:
            priority: The class of the requests.
            timeout: Seconds for waiting, queue and run; None for no timeout.
            min_epoch: Requests run on the weights of this epoch or a later one. They wait for its
                publication, and fail with EpochError when it was rolled back.
            tenant: A customer's name, say. The requests of each tenant share the runner equally
                with those of each other one. Requests of no tenant count as one more tenant.
            tag: Your name for the requests, such as the id of the user's request. It is in their
                traces, log events and errors, and "" removes it. At most 200 characters.
            copy: Copy the inputs at submit, so that they may be written to afterwards. Otherwise an
                input must not change until its request has ended.

        Raises:
            ConfigError: A value is of the wrong type or out of range; it is a ValueError.
            TypeError: The tenant can't be hashed.
        """
        old = self._options
        # Values of foreign types are compared, converted and hashed here, and not in the middle of
        # a request.
        if tenant is msgspec.UNSET:
            whose = old.tenant
        else:
            whose = None if tenant is None else self._router.tenants.of(tenant)
        if timeout is msgspec.UNSET:
            timeout = old.timeout
        elif timeout is not None:
            timeout = arguments.timeout("options(timeout=)", timeout)
        if min_epoch is not None:
            min_epoch = arguments.whole("options(min_epoch=)", min_epoch)
        return self._with(
            Options(
                old.priority if priority is None else _priority(priority),
                timeout,
                old.min_epoch if min_epoch is None else min_epoch,
                whose,
                old.tag if tag is None else _tag(tag),
                old.copy if copy is None else arguments.flag("options(copy=)", copy),
                old.pinned,
            )
        )

    @abstractmethod
    def _with(self, options: Options) -> _View:
        """Return a handle with other options."""

    @property
    def _target(self) -> Router | Replica:
        """What the requests go to: the runner's replicas, or the replica of a lease."""
        return self._router

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._router.name!r} on {self._target.device}>"


def must_leave_a_slot(handle: Handle[Any, ..., Any], call: str = "run()") -> None:
    """Raise LeaseError if the caller would await a slot while it holds every slot itself."""
    router = handle._router  # noqa: SLF001
    if router.holders.held and handle._target is router:  # noqa: SLF001
        router.holders.must_leave_a_slot(call)


def call_of_thread(
    handle: Handle[Any, ..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, waits: bool
) -> CallOfThread:
    """Return how another thread hands a request over to the event loop.

    Args:
        handle: What is called.
        args: The positional arguments of the model.
        kwargs: The keyword arguments of the model.
        waits: Whether the thread does nothing else until the request ends.
    """
    router = handle._router  # noqa: SLF001
    return CallOfThread(
        router.blocking,
        router.name,
        handle._submission(args, kwargs, waits=waits),  # noqa: SLF001
        handle._target.inherit_stream,  # noqa: SLF001
        handle._options.timeout,  # noqa: SLF001
    )


def wrong_loop(name: str) -> UnsupportedLoopError:
    """Return the error of a call outside the runner's event loop."""
    return UnsupportedLoopError(
        f"runner {name!r} belongs to another event loop (or none is running here); call it on the "
        "loop that loaded it, or use run_blocking(...) from another thread"
    )


def _tag(value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TAG:
        raise ConfigError(
            f"options(tag=): expected a text of at most {_LONGEST_TAG} characters, got "
            f"{brief(value)}."
        )
    return readable(value)


def _priority(value: object) -> Priority:
    if type(value) is Priority:
        return value
    try:
        return Priority(arguments.index(value))
    except (TypeError, ValueError):
        raise ConfigError(
            f"options(priority=): expected Priority.HIGH, NORMAL or LOW, got {brief(value)}."
        ) from None
