"""`RawHandle`: the handle of a container behind the C ABI, and calls on it."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_char_p, c_size_t, c_void_p
from typing import TYPE_CHECKING, Any

from aoti_sched.backends.aoti.c_abi import Library
from aoti_sched.backends.aoti.handles import free
from aoti_sched.errors import LoadError, RunnerClosedError

if TYPE_CHECKING:
    from aoti_sched.backends.aoti.proxy_executor import ProxyExecutor

PREFIX = "AOTInductorModelContainer"


class RawHandle:
    """The handle of a container; `RawContainer` describes the arguments.

    A container that can't be inspected is freed at once.
    """

    def __init__(
        self,
        library: Library,
        instances: int = 1,
        device: str = "cpu",
        resources: str | None = None,
    ) -> None:
        if instances < 1:
            raise LoadError(
                f"{library.name}: expected at least one instance, got instances={instances}."
            )
        self.library = library
        self.name = library.name
        self.device = device
        self.device_type = device.partition(":")[0]
        # Calls operators that have no C function; None where the model calls none, or can't.
        self.proxy: ProxyExecutor | None = None
        # Whether the device has failed for good. Then nothing is freed: the memory ends with the
        # process, and code of torch before 2.13 would end the process when it frees (#184818).
        self.is_lost: Callable[[], bool] = bool
        self._lent: list[int] = []
        handle = c_void_p()
        directory = None if resources is None else resources.encode()
        if library.has(PREFIX + "CreateWithDevice"):
            library.call(
                PREFIX + "CreateWithDevice", byref(handle), instances, device.encode(), directory
            )
        elif device in ("cpu", "cuda"):
            library.call(PREFIX + "Create", byref(handle), instances, device == "cpu", directory)
        else:
            library.function(PREFIX + "CreateWithDevice")
        self._handle: int | None = handle.value
        try:
            self._inspect()
        except BaseException:
            self.close()
            raise

    def _inspect(self) -> None:
        """Read the new container's properties. When that fails, the container is freed."""

    def close(self) -> None:
        """Free the container. No call may be going on. Closing twice does nothing."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            if self.is_lost():
                return
            try:
                self.library.call(PREFIX + "Delete", handle)
            finally:
                free(self._lent)
                self._lent.clear()

    def _open(self) -> int:
        if self._handle is None:
            raise RunnerClosedError(f"{self.name}: the container is closed. Load the model again.")
        return self._handle

    def _call(self, name: str, *arguments: Any) -> None:
        self.library.call(PREFIX + name, self._open(), *arguments)

    def _get(self, kind: Any, name: str, *arguments: Any) -> Any:
        value = kind()
        self._call(name, *arguments, byref(value))
        return value.value

    def _names(self, count: str, name: str) -> tuple[str, ...]:
        return tuple(
            self._get(c_char_p, name, index).decode() for index in range(self._get(c_size_t, count))
        )

    def _optional(self, kind: Any, name: str, index: int, *, default: Any) -> Any:
        return self._get(kind, name, index) if self.library.has(PREFIX + name) else default

    def _proxy_executor(self) -> int | None:
        return None if self.proxy is None else self.proxy.address
