"""`aoti-sched compile`: compiles a PyTorch module into a package."""

from __future__ import annotations

import json as json_module
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.options import Flag, Texts
from aoti_sched.cli.output import Report, err, out, print_json
from aoti_sched.cli.units import size_text, time_text

if TYPE_CHECKING:
    from aoti_sched.compile_stages import Stage

_WORDS: dict[Stage, str] = {
    "exporting": "exporting the module",
    "examining": "running it on other inputs",
    "lowering": "lowering to C++",
    "compiling": "compiling the C++",
    "verifying": "running the compiled code",
    "packaging": "writing the package",
}


class CompileReport(Report, frozen=True, kw_only=True):
    """What `compile --json` prints.

    Attributes:
        path: The package.
        bytes: Its size.
        stages: Seconds of each stage.
    """

    path: str
    bytes: int
    stages: dict[str, float]


def compile_command(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    example: Texts = (),
    dynamic: Texts = (),
    freeze: Flag = False,
    threads: int = 1,
    batch_dim: int | None = None,
    metadata: Texts = (),
    option: Texts = (),
    json: Flag = False,
) -> None:
    """Compile a PyTorch module into a package.

    Args:
        source: MODULE:FACTORY or FILE.py:FACTORY, or an exported program in a .pt2 file. A factory
            is a module, or a function or class that returns one, alone or in a tuple with its
            example arguments.
        output: The package, which ends in .pt2.
        example: An example argument, as VALUE or NAME=VALUE. VALUE is a random tensor such as
            float32[8,16] or int64[2,8]:0..99, a tensor in @FILE or @FILE:KEY, or a value in JSON,
            which is compiled in.
        dynamic: A size that is free, as NAME=MIN..MAX, such as batch=1..64: of dimension 0 of each
            tensor, or of the places that follow, as in tokens=2..128:ids.1,mask.1.
        freeze: Fold the weights into the code. Runs are faster, and no update can change them.
        threads: Threads of a run.
        batch_dim: The dimension along which requests may be batched.
        metadata: A text to store in the package, as KEY=TEXT.
        option: A further option of inductor, as KEY=JSON.
        json: Print JSON.
    """
    from aoti_sched.cli.doctor import find_compiler
    from aoti_sched.cli.sources import read_source

    if output.suffix != ".pt2":
        raise UsageError(f"--output {output}: a package's name must end in .pt2.")
    texts = _pairs("--metadata", metadata)
    options = {key: _json(key, text) for key, text in _pairs("--option", option).items()}
    if not find_compiler():
        raise UsageError("there is no C++ compiler. Install g++, or name a compiler in $CXX.")
    stages = Stages()
    with warnings.catch_warnings(), stages.shown():
        warnings.simplefilter("ignore")  # torch warns of its own code, which no user can change
        stages.begin("loading torch and the module")
        found = read_source(source, example, dynamic)
        from aoti_sched import compile_package

        compile_package(
            found.module,
            found.args,
            output,
            example_kwargs=found.kwargs,
            dynamic=found.dynamic,
            threads=threads,
            freeze=freeze,
            batch_dim=batch_dim,
            metadata=texts,
            options=options,
            progress=lambda stage: stages.begin(_WORDS[stage]),
        )
    names = {words: stage for stage, words in _WORDS.items()}
    report = CompileReport(
        path=str(output),
        bytes=output.stat().st_size,
        stages={names.get(words, "loading"): took for words, took in stages.seconds.items()},
    )
    if json:
        print_json(report)
    else:
        took = time_text(sum(report.stages.values()))
        out().print(f"{report.path}: {size_text(report.bytes)}, compiled in {took}")


class Stages:
    """Shows stages on stderr: with a spinner on a terminal, else a line for each.

    Attributes:
        seconds: What each stage took, by its words.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._words = ""
        self._began = 0.0
        self._console = err()
        self._status: Any = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the stages that begin within the block."""
        try:
            yield
            self._end()
        finally:
            if self._status is not None:
                self._status.stop()

    def begin(self, words: str) -> None:
        """End the stage before, and begin one."""
        self._end()
        self._words, self._began = words, time.monotonic()
        if not self._console.is_terminal:
            self._console.print(words)
        elif self._status is None:
            self._status = self._console.status(words)
            self._status.start()
        else:
            self._status.update(words)

    def _end(self) -> None:
        if self._words:
            took = time.monotonic() - self._began
            self.seconds[self._words] = self.seconds.get(self._words, 0.0) + took
            if self._console.is_terminal:
                self._console.print(f"{self._words}: {time_text(took)}")
        self._words = ""


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} {text}: write KEY=VALUE.")
        found[key] = value
    return found


def _json(key: str, text: str) -> Any:
    try:
        return json_module.loads(text)
    except ValueError as error:
        raise UsageError(f"--option {key}={text}: no JSON: {error}.") from error
