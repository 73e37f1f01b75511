"""Walks through a large JSON object member by member.

A parser in C holds the GIL for the whole text: 200 ms for 16 MB, in which the event loop is
blocked. Here Python finds where each member begins and ends, so other threads can run in between. A
parser then reads each member.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

_SPACE = re.compile(rb"[ \t\r\n]*")
_FLAT = re.compile(
    rb'\{(?:[^{}"]*"[^"\\{}]*"){0,16}[^{}"]*\}'
)  # no string in it has a brace, or an escape
_PLAIN = re.compile(rb'[^"\\]*')
_UNTIL_BRACKET = re.compile(rb'[^"{}\[\]]*')
_SCALAR = re.compile(rb"[^,}\] \t\r\n]+")


class JsonScan:
    """A place in a JSON text. Every method raises ValueError where the text is no JSON."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that begins here.

        The caller takes or skips each value before it asks for the next key.
        """
        self._expect(b"{")
        if self._take(b"}"):
            return
        while True:
            key = self._raw(string=True)
            self._expect(b":")
            yield msgspec.json.decode(key, type=str)
            if not self._take(b","):
                self._expect(b"}")
                return

    def value(self, limit: int) -> bytes:
        """Return the text of the next value; raise ValueError if it is longer than `limit`."""
        raw = self._raw()
        if len(raw) > limit:
            raise ValueError(f"a value of more than {limit} bytes at byte {self._at - len(raw)}")
        return raw

    def skip(self) -> None:
        """Pass over the value that begins here."""
        self._raw()

    def end(self) -> None:
        """Only space may follow."""
        self._space()
        if self._at < len(self._text):
            raise ValueError(f"more than one object: byte {self._at}")

    def _raw(self, *, string: bool = False) -> bytes:
        self._space()
        start = self._at
        first = self._text[start : start + 1]
        flat = _FLAT.match(self._text, start) if first == b"{" and not string else None
        if flat is not None:
            self._at = flat.end()
        elif first == b'"':
            self._string()
        elif first in (b"{", b"[") and not string:
            self._nested()
        else:
            scalar = None if string else _SCALAR.match(self._text, start)
            if scalar is None:
                raise ValueError(f"no JSON at byte {start}")
            self._at = scalar.end()
        return self._text[start : self._at]

    def _nested(self) -> None:
        depth = 0
        while True:
            self._at = _UNTIL_BRACKET.match(self._text, self._at).end()  # type: ignore[union-attr]
            what = self._text[self._at : self._at + 1]
            if what == b'"':
                self._string()
                continue
            if not what:
                raise ValueError("an object that does not end")
            self._at += 1
            depth += 1 if what in (b"{", b"[") else -1
            if depth == 0:
                return

    def _string(self) -> None:
        self._at += 1
        while True:
            self._at = _PLAIN.match(self._text, self._at).end()  # type: ignore[union-attr]
            what = self._text[self._at : self._at + 1]
            if not what:
                raise ValueError("a string that does not end")
            self._at += 1 if what == b'"' else 2
            if what == b'"':
                return

    def _space(self) -> None:
        self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]

    def _take(self, what: bytes) -> bool:
        self._space()
        there = self._text.startswith(what, self._at)
        self._at += there
        return there

    def _expect(self, what: bytes) -> None:
        if not self._take(what):
            raise ValueError(f"expected {what.decode()!r} at byte {self._at}")
