"""Request: what the dispatcher knows of a job's payload, and the error of a missed deadline.

A file of its own, since `dispatcher.py` is compiled: a class that is defined there would be
demanded at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from aoti_sched.errors import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aoti_sched.backends.contracts import Container
    from aoti_sched.events import CallerObserver
    from aoti_sched.model.batch_layout import Grouping
    from aoti_sched.queue.job import Job

    Callers = Sequence[tuple[CallerObserver, Any]]


class Model(Protocol):
    """What a run needs of the model on this device. A `Replica` has it."""

    container: Container
    threads: int
    batch_layout: Grouping | None


class Request(Protocol):
    """The caller's future, with the inputs of its run. A `RunFuture` is one."""

    _inputs: Sequence[Any]
    _replica: Model

    def done(self) -> bool: ...

    def set_result(self, result: Any) -> None: ...

    def _deliver(self, outputs: list[Any]) -> None: ...

    def _refuse(self, error: BaseException) -> None: ...


def deadline_error(job: Job, takes: float | None) -> DeadlineExceededError:
    """Return the error of a request whose deadline has passed, or can't be met.

    Args:
        job: The request's.
        takes: The seconds that a run takes, where the request was ended before its deadline.
    """
    timeout = (job.deadline or 0.0) - job.submitted if job.timeout is None else job.timeout
    if takes is not None:
        return DeadlineExceededError(
            f"runner {job.source.name!r}: the request's timeout of {timeout:.15g} s can't be met "
            f"any more: a run takes about {takes:.3g} s; it was not started"
        )
    if job.lane >= 0:
        where = "running; its result will be dropped"
    else:
        where = "waiting for a lease" if job.is_lease_request else "queued"
    return DeadlineExceededError(
        f"runner {job.source.name!r}: the request's timeout of {timeout:.15g} s passed while it "
        f"was {where}"
    )
