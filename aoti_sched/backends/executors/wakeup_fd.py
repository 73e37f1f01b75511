"""WakeupFd: tells the event loop, through one descriptor, that completions wait."""

from __future__ import annotations

import contextlib
import os


class WakeupFd:
    """Makes a descriptor readable from any thread. Several sets before a clear write only once.

    The descriptor is closed with the last reference to this object. A thread that may still set the
    descriptor keeps a reference, so the system does not reuse the descriptor's number.
    """

    fd = _write_end = -1

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.fd = self._write_end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.fd, self._write_end = os.pipe()  # like eventfd, closed in executed programs
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write_end, False)
        self._is_set = False

    def set(self) -> None:
        """Make the descriptor readable."""
        if not self._is_set and self.fd >= 0:
            self._is_set = True
            os.write(self._write_end, b"\1\0\0\0\0\0\0\0")  # an eventfd takes eight bytes

    def clear(self) -> None:
        """Make the descriptor unreadable.

        Take completions only after this call. Otherwise a `set` in between is lost.
        """
        if self.fd < 0:
            return
        # There is no byte to read when a thread has set the flag and not yet written. Its write
        # then causes one wake-up too many.
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        self._is_set = False

    def close(self) -> None:
        """Close the descriptors. No thread may set them any more. Closing twice does nothing."""
        open_ends = {self.fd, self._write_end} - {-1}
        self.fd = self._write_end = -1
        for fd in open_ends:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
