"""Handle: what can be called. A runner, a view of a runner with other options, or a lease.

`run` and `submit` take exactly the model's own arguments. Scheduling options are passed separately,
with `options(...)`, which returns a light and immutable handle.
"""

from __future__ import annotations

from asyncio import _get_running_loop  # the public one raises, and this one is for the hot path
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from aoti_sched import arguments
from aoti_sched.engine.future import RunFuture, future_of
from aoti_sched.engine.tenants import Tenant
from aoti_sched.errors import ConfigError, UnsupportedLoopError, brief
from aoti_sched.queue.job import Job, Priority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router
    from aoti_sched.queue.runner_state import Source


class Options(msgspec.Struct, frozen=True):
    """How requests are scheduled.

    Attributes:
        priority: The class of the requests.
        timeout: Seconds for waiting, queue and run; None for no timeout.
        min_epoch: The earliest epoch that the requests run on.
        tenant: Shares the runner equally with each other tenant.
    """

    priority: Priority = Priority.NORMAL
    timeout: float | None = None
    min_epoch: int = 0
    tenant: Tenant | None = None


_View = TypeVar("_View", bound="Handle[Any]")


class Handle(Generic[_View]):
    """What can be called.

    Type parameter: what `options()` returns.

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

    async def run(self, *args: Any, **kwargs: Any) -> Any:
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
        """
        return await self.submit(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> RunFuture:
        """Queue a run now and return its future.

        Raises as `run` does, except for what happens later.
        """
        replica = self._replica
        options = self._options
        source = self._source
        if _get_running_loop() is not replica.loop:
            raise wrong_loop(replica.name)
        inputs = replica.call_spec.flatten(args, kwargs)
        size = replica.input_check(inputs)
        job = Job(source, options.priority, None, size)
        if options.tenant is not None:
            job.tenant = options.tenant
        layout = replica.batch_layout
        if layout is not None:
            job.rows, key = layout.measure(inputs)
            if source is replica.state:
                job.key = key
                if layout.max_tokens is not None:
                    job.tokens = layout.tokens(inputs)
        if options.timeout is not None:
            job.deadline = replica.dispatcher.deadline(options.timeout)
            job.timeout = options.timeout
        if options.min_epoch:
            job.min_epoch = options.min_epoch
        if replica.route is not None and source is replica.state:
            replica = replica.route(job)
        captured: Sequence[Any] = inputs
        if replica.capture_stream is not None:
            captured = replica.capture_stream(inputs)
        future = future_of(replica, job, captured)
        replica.dispatcher.submit(job, wait=replica.blocks_when_full)
        return future

    def run_blocking(self, *args: Any, **kwargs: Any) -> Any:
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

        def submit(left: float | None) -> RunFuture:
            handle: Handle[Any] = self if left is None else self.options(timeout=left)
            return handle.submit(*args, **kwargs)

        return router.blocking.run(
            router.name, submit, self._target.inherit_stream, self._options.timeout
        )

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        min_epoch: int | None = None,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
    ) -> _View:
        """Return a light handle with other options. What is not given stays as it is here.

        Args:
            priority: The class of the requests.
            timeout: Seconds for waiting, queue and run; None for no timeout.
            min_epoch: Requests run on the weights of this epoch or a later one. They wait for its
                publication, and fail with EpochError when it was rolled back.
            tenant: A customer's name, say. The requests of each tenant share the runner equally
                with those of each other one. Requests of no tenant count as one more tenant.

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
            )
        )

    def _with(self, options: Options) -> _View:
        """Return a handle with other options."""
        raise NotImplementedError

    @property
    def _target(self) -> Router | Replica:
        """What the requests go to: the runner's replicas, or the replica of a lease."""
        return self._router

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._router.name!r} on {self._target.device}>"


def wrong_loop(name: str) -> UnsupportedLoopError:
    """Return the error of a call outside the runner's event loop."""
    return UnsupportedLoopError(
        f"runner {name!r} belongs to another event loop (or none is running here); call it on the "
        "loop that loaded it, or use run_blocking(...) from another thread"
    )


def _priority(value: object) -> Priority:
    if type(value) is Priority:
        return value
    try:
        return Priority(arguments.index(value))
    except (TypeError, ValueError):
        raise ConfigError(
            f"options(priority=): expected Priority.HIGH, NORMAL or LOW, got {brief(value)}."
        ) from None
