"""Torch's proxy executor, by which compiled code calls operators that have no C function.

Some of aten's operators and all custom operators have no C function.

Only torch's own runner makes a proxy executor. Torch exports neither the class nor a function that
makes one. So the runner loads an empty model (`native/proxy_model.c`) beside the files of the real
model. The runner makes the executor from those files and passes it to the empty model's run, which
records the address. Nothing else of the runner is used, because the executor does not know which
model calls it. The executor does not take the GIL. An operator written in Python takes the GIL
while it runs.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch

from aoti_sched.backends.aoti.operators import (
    in_python,
    names,
    operators_of,
    sentence,
    why_not_callable,
)
from aoti_sched.backends.aoti.stock_runner import stock_runner
from aoti_sched.errors import LoadError


class ProxyExecutor:
    """The proxy executor of one model on one device. Keep this object longer than its runs.

    Args:
        runner: Torch's runner, which owns the executor.
        address: The executor's address for compiled code; 0 where the model lists no operators.
        operators: The operators that the model calls.
    """

    def __init__(self, runner: Any, address: int, operators: tuple[str, ...]) -> None:
        self._runner = runner
        self.address = address
        self.operators = operators
        self._in_python = in_python(operators)

    @property
    def note(self) -> str:
        """A note for users on the operators."""
        slow = self._in_python
        held = (
            f" Written in Python, so that the GIL is held while they run: {names(slow)}."
            if slow
            else ""
        )
        return sentence(self.operators) + held

    @property
    def gil(self) -> str:
        """As `ContainerInfo.gil`."""
        return "held" if self._in_python else "released"


def open_proxy_executor(name: str, device: str, library: Path) -> tuple[ProxyExecutor | None, str]:
    """Return the proxy executor of an extracted model, or None and the reason why there is none.

    Args:
        name: The model's name in errors.
        device: The model's device: "cpu", "cuda:0", "xpu:0" or "mps".
        library: The model's library, beside which the other files of the model lie.

    Raises:
        LoadError: Torch can't call the operators, for example because one is not registered.
    """
    empty = _empty_model()
    if empty is None:
        return None, "it was installed without the native module"
    operators = operators_of(library)
    try:
        with tempfile.TemporaryDirectory(prefix="aoti-sched-") as scratch:
            for file in library.parent.iterdir():
                if file.is_file() and file.suffix not in (".so", ".cpp", ".o"):
                    Path(scratch, file.name).symlink_to(file.absolute())
            stand_in = Path(scratch, library.name)  # by this name torch finds the list of operators
            stand_in.symlink_to(empty)
            try:
                runner = stock_runner(device, stand_in, 1)
                runner.run([])
            except RuntimeError as error:
                raise LoadError(
                    f"{name}: torch can't call its operators: {why_not_callable(error, operators)}"
                ) from error
    except OSError as error:
        return None, f"no temporary directory can be used: {error}"
    address = _given(empty)
    if not address and library.with_suffix(".json").exists():
        return None, f"this torch ({torch.__version__}) does not expose it"
    return ProxyExecutor(runner, address, operators), ""


def _empty_model() -> Path | None:
    try:
        from aoti_sched.backends.native import _native
    except ImportError:
        return None
    path = Path(_native.__file__).with_name("proxy_model.so")
    return path if path.exists() else None


def _given(empty: Path) -> int:
    given = ctypes.CDLL(str(empty)).aoti_sched_given_proxy_executor
    given.argtypes = ()
    given.restype = ctypes.c_void_p
    return given() or 0
