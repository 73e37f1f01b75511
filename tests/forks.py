"""Programs in copies of one interpreter, which has imported what they need.

A copy begins within milliseconds. An interpreter of its own and its imports take much longer,
which is most of what a test of a short program takes. A copy has its own arguments, environment,
folder and streams, and ends as any interpreter does. What an interpreter reads when it starts,
options and variables whose names begin with PYTHON, is the same for all copies.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 200_000
"""Bytes of a request: arguments and an environment."""


class Forks:
    """An interpreter that has imported these modules, and waits for programs."""

    def __init__(self, *modules: str, options: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *options, "-m", "tests.forks", str(theirs.fileno()), *modules],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control = ours
        atexit.register(self.close)

    def close(self) -> None:
        self._control.close()  # the interpreter ends when it is closed
        self._process.wait()

    def run(
        self,
        how: str,
        program: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path | None,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        """Do what `python -m` does with a module, or `python -c` with a text, and return what
        `subprocess.run` returns.
        """
        request = {
            "how": how,
            "program": program,
            "arguments": [*arguments],
            "environment": {**environment},
            "folder": os.fspath(folder or Path.cwd()),
        }
        with (
            Path(os.devnull).open() as nothing,
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
        ):
            streams = [nothing.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(self._control, [json.dumps(request).encode()], streams)
            pid = int(self._control.recv(LARGEST))
            self._control.settimeout(timeout)
            try:
                code = int(self._control.recv(LARGEST))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._control.settimeout(None)
                self._control.recv(LARGEST)
                raise subprocess.TimeoutExpired(program, timeout) from None
            self._control.settimeout(None)
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([program, *arguments], code, out.read(), err.read())


def _become_copy(control: socket.socket) -> tuple[str, str]:
    """Fork a copy for each request. Return only in a copy: its option and its program."""
    while True:
        message, streams, _, _ = socket.recv_fds(control, LARGEST, 3)
        if not message:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            break
        for stream in streams:
            os.close(stream)
        control.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        control.send(str(os.waitstatus_to_exitcode(status)).encode())
    control.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    request = json.loads(message)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    sys.argv[:] = [request["how"], *request["arguments"]]
    return request["how"], request["program"]


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    with socket.socket(fileno=int(sys.argv[1])) as of_tests:
        option, what = _become_copy(of_tests)
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
