"""Runnable: what has `run` and `submit`. Runners, views of them, leases and sessions do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from aoti_sched.engine.future import RunFuture


@runtime_checkable
class Runnable(Protocol[P, R]):
    """What a model can be called by: a runner, a view of a runner, a lease or a session.

    Write functions that only call a model for this type. `isinstance` checks the two names.

    Type parameters: the arguments of the model, and its result.
    """

    async def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the model on the exported module's own arguments and return its result."""
        ...

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> RunFuture[R]:
        """Queue a run now and return its future."""
        ...
