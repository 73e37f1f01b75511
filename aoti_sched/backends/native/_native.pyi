"""Native lanes: threads that run compiled models and never touch Python. Addresses are plain integers."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Taken: TypeAlias = tuple[int, list[Any] | tuple[str, str], float, float]
"""Token, outputs (None where one was left out) or the runtime's and torch's words for a failure, start and end in
seconds of the monotonic clock."""

class ForkedError(RuntimeError):
    """A forked child used the lanes of its parent, whose threads it does not have."""

class Model:
    """How one model is run; must outlive its works."""

    def __init__(
        self,
        *,
        run: int,
        container: int,
        num_inputs: int,
        num_outputs: int,
        last_error: int = 0,
        proxy_executor: int = 0,
    ) -> None: ...

class Tensors:
    """How tensors become handles and come back; directly where `new_handle` and `wrap` are given, otherwise through
    torch's functions for lists of capsules."""

    def __init__(
        self,
        type: type,
        to_capsules: Callable[[list[Any]], list[Any]],
        from_capsules: Callable[[list[Any]], list[Any]],
        *,
        new_handle: int = 0,
        wrap: int = 0,
    ) -> None: ...

class Lanes:
    """A device's lanes. After a fork, the child's copy refuses to work."""

    def __init__(
        self,
        names: Sequence[str],
        affinities: Sequence[int],
        cores: int,
        tensors: Tensors,
        *,
        delete_tensor: int,
        root_cause: int = 0,
        get_threads: int = 0,
        set_omp_threads: int = 0,
        set_mkl_threads: int = 0,
    ) -> None: ...
    def submit(
        self,
        lane: int,
        token: int,
        model: Model,
        inputs: Sequence[Any],
        threads: int,
        stream: int = 0,
        fence: int = 0,
        fence_argument: int = 0,
    ) -> None:
        """Hand a work to a lane. When it raises, nothing was taken."""

    def drain(self, limit: int) -> list[Taken]:
        """At most so many completions, oldest first, as (token, outputs or error, started, finished)."""

    def run_here(self, model: Model, inputs: Sequence[Any], threads: int) -> Taken:
        """Run on the calling thread, the GIL held; a completion as of `drain`. The thread has its own counts again after."""

    def ring(self) -> None:
        """Make the descriptor readable."""

    def fileno(self) -> int: ...
    def count(self) -> int: ...
    def close(self) -> None:
        """Wait for what was submitted and join the threads."""
