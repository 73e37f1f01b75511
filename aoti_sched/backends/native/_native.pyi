"""Native lanes: threads that run compiled models and never touch Python. Addresses are plain integers."""

from collections.abc import Sequence
from typing import Any, TypeAlias

Capsule: TypeAlias = Any
"""torch's unnamed PyCapsule around an AtenTensorHandle."""

Taken: TypeAlias = tuple[int, list[Capsule | None] | None, tuple[str, str] | None, float, float]
"""Token, outputs (to be turned into tensors, or they leak), the runtime's and torch's words for a failure, start and
end in seconds."""

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
        threads: int = 1,
    ) -> None: ...

class Lanes:
    """A device's lanes. After a fork, the child's copy refuses to work."""

    def __init__(
        self,
        names: Sequence[str],
        affinities: Sequence[int],
        cores: int,
        *,
        delete_tensor: int,
        root_cause: int = 0,
        init_threads: int = 0,
        set_omp_threads: int = 0,
        set_mkl_threads: int = 0,
    ) -> None: ...
    def submit(
        self,
        lane: int,
        token: int,
        model: Model,
        inputs: list[Capsule],
        stream: int = 0,
        fence: int = 0,
        fence_argument: int = 0,
    ) -> None:
        """Hand a work to a lane; the inputs' handles are taken. When it raises, they are still the caller's to free."""

    def drain(self, limit: int) -> list[Taken]:
        """At most `limit` completions, oldest first."""

    def run_here(self, model: Model, inputs: list[Capsule]) -> Taken:
        """Run on the calling thread, the GIL held."""

    def ring(self) -> None:
        """Make the descriptor readable."""

    def fileno(self) -> int: ...
    def count(self) -> int: ...
    def close(self) -> None:
        """Wait for what was submitted and join the threads."""
