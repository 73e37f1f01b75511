"""Torch's own container runner, for models whose operators need torch's proxy executor.

This runner is used where `proxy_executor.py` can't take the proxy executor from such a runner.

`torch._C._aoti.AOTIModelContainerRunner*` makes an executor from the files beside the library.
There is a runner for each kind of device. On torch 2.13, the binding holds the GIL for the whole
run, so the event loop is blocked meanwhile.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aoti_sched.backends.aoti.handles import capsule_of
from aoti_sched.backends.aoti.operators import names, operators_of, sentence, why_not_callable
from aoti_sched.backends.aoti.packaged_weights import GivenWeights, load_weights, read_stored
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.aoti.stock_runner import stock_runner
from aoti_sched.backends.contracts import ContainerInfo, HostContainer, LoadRequest, StagedSet
from aoti_sched.backends.executors.batches import Staging
from aoti_sched.backends.reading import Reading
from aoti_sched.errors import LoadError, RunError, UpdateError
from aoti_sched.events import log
from aoti_sched.model.specs import ModelSpec
from aoti_sched.package import Extracted


class TorchRunnerContainer(HostContainer):
    """The stock runner behind the container's contract.

    Args:
        raw: A container that describes the model, and is closed afterwards.
        why: Why torch's proxy executor can't be had alone.
    """

    def __init__(
        self,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        spec: ModelSpec | None = None,
        *,
        device: str = "cpu",
        why: str,
    ) -> None:
        self._library = raw.library
        self._name = request.name
        self._instances = request.instances
        self._gil = "held"
        self._why = why
        self._operators = operators_of(extracted.library)
        self.staging = Staging(raw.name)
        self._device_name = device
        self._extracted = extracted
        if extracted.weights_blob is not None:
            raise LoadError(
                f"{raw.name}: it needs torch's own runner, which can't load weights from a blob "
                "here. Compile it with the weights in the library."
            )
        # On the describing container, which refuses what can't be complete. Weights that were given
        # stay on the host.
        given = None
        if request.weights is not None:
            given = GivenWeights(request, spec.weights if spec is not None else ())
        load_weights(raw, extracted, given)
        self._kept = raw.extract(host=True) if given is not None else {}
        self._call_spec = raw.call_spec()
        self._counts = raw.num_inputs, raw.num_outputs
        self._constants = tuple(constant.spec for constant in raw.constants)
        self.constant_bytes = sum(constant.capacity for constant in raw.constants)
        raw.close()
        self._runner: Any = self._make()
        log.warning(
            "model runs through torch's own runner",
            runner=request.name,
            operators=names(self._operators),
            why=f"torch's proxy executor, which calls them, can't be had alone: {why}",
            cost="the GIL is held for the whole run: the event loop stands still meanwhile",
        )

    def _make(self) -> Any:
        """Return a runner with the package's weights."""
        try:
            runner = stock_runner(self._device_name, self._extracted.library, self._instances)
            stored = self._kept or read_stored(f"model {self._name!r}", self._extracted)
            if stored:
                names = {spec.fqn: spec.name for spec in self._constants}
                constants = {names[f]: t.to(self._device_name) for f, t in stored.items()}
                runner.update_constant_buffer(constants, False, False)
        except RuntimeError as error:
            raise LoadError(
                f"model {self._name!r}: torch's runner could not be made: "
                f"{why_not_callable(error, self._operators)}"
            ) from error
        return runner

    @property
    def info(self) -> ContainerInfo:
        return ContainerInfo(
            runtime="torch runner",
            reason=f"{sentence(self._operators)} It runs through torch's own runner, since torch's "
            "proxy executor can't be had "
            f"alone ({self._why}); the runner ".lstrip()
            + (
                "released the GIL when probed."
                if self._gil == "released"
                else "holds the GIL: the event loop stands still during its runs."
            ),
            gil=self._gil,
            instances=self._instances,
            num_inputs=self._counts[0],
            num_outputs=self._counts[1],
            in_spec=self._call_spec[0],
            out_spec=self._call_spec[1],
            constants=self._constants,
        )

    c_run = None  # only torch's binding can run it

    def detach_outputs(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        return outputs

    def run_raw(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return self._run_on(inputs)

    def _run_on(self, inputs: Sequence[torch.Tensor], stream: int = 0) -> list[torch.Tensor | None]:
        """Run on a device's stream, given as a capsule; 0 for the current stream or none."""
        runner = self._runner
        if runner is None:
            raise RunError(f"model {self._name!r} is closed")
        try:
            with torch.no_grad():
                on = (capsule_of(stream),) if stream else ()
                outputs: list[torch.Tensor | None] = list(runner.run(list(inputs), *on))
        except RuntimeError as error:
            cause = self._library.root_cause() or str(error)
            raise RunError(f"model {self._name!r}: the run failed: {cause}") from error
        return outputs

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        for _ in range(self._instances):
            self.run_raw(make_inputs())
        inputs = make_inputs()
        self._gil = gil_during(lambda: self.run_raw(inputs))

    def close(self) -> None:
        self._runner = None
        self.staging.clear()

    def rebuild(self) -> None:
        self._runner = self._make()  # its weights are the package's: they can't be changed

    unparkable = ""

    def park(self) -> None:
        self._runner = None
        self.staging.clear()

    def unpark(self, reading: Reading | None = None) -> None:
        del reading
        self.rebuild()

    # --- live weights: torch's runner can't fold or extract, so a failed update could not be undone

    updatable = "it runs through torch's own runner, which can't undo a failed update"
    folds = False
    graphs = 0

    inactive_ready = False
    inactive_bytes = 0

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        del weights, partial, strict, check_finite, reading
        raise self._not_updatable()

    def fold(self) -> None:
        raise self._not_updatable()

    def swap(self) -> None:
        raise self._not_updatable()

    def free_inactive(self) -> None:
        raise self._not_updatable()

    def extract(self, *, inactive: bool = False) -> dict[str, torch.Tensor]:
        del inactive
        raise self._not_updatable()

    def _not_updatable(self) -> UpdateError:
        return UpdateError(f"model {self._name!r}: {self.updatable}")


def gil_during(call: Callable[[], object]) -> str:
    """Return what a blocking call does with the GIL: "held" or "released".

    Another thread is watched during the call. Torch is about to release the GIL
    (pytorch/pytorch#197516), so the answer is probed and not assumed. A call that is too short to
    tell (under 10 ms) counts as "held": for such a call it hardly matters.
    """
    stamps: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            stamps.append(time.monotonic())
            done.wait(0.001)

    watcher = threading.Thread(target=watch, name="aoti:gil-probe", daemon=True)
    watcher.start()
    started = time.monotonic()
    try:
        call()
    finally:
        finished = time.monotonic()
        done.set()
        watcher.join()
    if finished - started < 0.010:
        return "held"
    inside = [started, *(stamp for stamp in stamps if started < stamp < finished), finished]
    longest = max(later - earlier for earlier, later in itertools.pairwise(inside))
    return "held" if longest > (finished - started) / 2 else "released"
