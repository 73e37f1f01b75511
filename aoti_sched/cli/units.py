"""Sizes and times: read from words such as "2 GiB" and "20ms", and written for people."""

from __future__ import annotations

import re

from aoti_sched.cli.failures import UsageError

_SIZES: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate(("k", "M", "G", "T"), 1)},
    **{f"{letter}iB": 1 << 10 * power for power, letter in enumerate(("K", "M", "G", "T"), 1)},
}
_TIMES = {
    "": 1.0, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip
_MEASURE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]*)\s*")


def size(text: str, what: str) -> int:
    """Return a number of bytes, such as "512", "1.5 GB" or "2GiB".

    Raises:
        UsageError: The text is no size; the message names `what`.
    """
    found = _MEASURE.fullmatch(text)
    if found is None or found[2] not in _SIZES:
        units = ", ".join(filter(None, _SIZES))
        raise UsageError(f"{what}: {text!r} is no size. Write a number and one of {units}.")
    return round(float(found[1]) * _SIZES[found[2]])


def seconds(text: str, what: str) -> float:
    """Return a time in seconds, such as "10", "20ms" or "30d".

    Raises:
        UsageError: The text is no time; the message names `what`.
    """
    found = _MEASURE.fullmatch(text)
    if found is None or found[2] not in _TIMES:
        units = ", ".join(filter(None, _TIMES))
        raise UsageError(f"{what}: {text!r} is no time. Write a number and one of {units}.")
    return float(found[1]) * _TIMES[found[2]]


def size_text(count: int) -> str:
    """Return a number of bytes for people: "1.4 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def time_text(value: float) -> str:
    """Return seconds for people, with three digits: "1.23 ms", "4.5 h"."""
    if value < 999.5e-6:  # more would be rounded to 1e+03
        return f"{value * 1e6:.3g} µs"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms"
    for unit, length, most in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172_800.0)):
        if value < most:
            return f"{value / length:.3g} {unit}"
    return f"{value / 86400:.3g} d"
