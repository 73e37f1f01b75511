"""Bell: tells the event loop, through one descriptor, that completions wait."""

from __future__ import annotations

import contextlib
import os


class Bell:
    """Makes a descriptor readable from any thread. Rung many times before it is heard, it is written to once.

    Its last owner closes it: a thread that may still ring keeps the bell, and so the descriptor's number, from being
    given to another file.
    """

    fd = _write_end = -1

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.fd = self._write_end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.fd, self._write_end = os.pipe()  # as eventfd, not inherited by what is executed
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write_end, False)
        self._rung = False

    def ring(self) -> None:
        if not self._rung and self.fd >= 0:
            self._rung = True
            os.write(self._write_end, b"\1\0\0\0\0\0\0\0")  # eight bytes: what an eventfd takes

    def hush(self) -> None:
        """Must come before looking at what was rung for, or a ring in between is lost."""
        if self.fd < 0:
            return
        # Nothing to read: a ringer has set the flag and not yet written; its write is one wake-up too many.
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        self._rung = False

    def close(self) -> None:
        """Give the descriptors back; no thread may ring any more. Closing twice does nothing."""
        open_ends = {self.fd, self._write_end} - {-1}
        self.fd = self._write_end = -1
        for fd in open_ends:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
