"""Checks of what users pass: a wrong value raises a `ConfigError` that names the argument.

The rule for the whole public API. A bool is no number, text is no number, NaN is no time, and a
number has to fit where it goes. Numbers and flags of other libraries (NumPy's scalars) count as
what they are. `ConfigError` is a `ValueError`.
"""

from __future__ import annotations

import datetime as dt
import decimal
import inspect
import math
import numbers
import operator
import os
import uuid
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aoti_sched.errors import ConfigError, brief

_T = TypeVar("_T")

# msgspec would write these as text, and a name of b"x" would become "eA==".
_NOT_TEXT = (
    bytes,
    bytearray,
    memoryview,
    dt.datetime,
    dt.date,
    dt.time,
    dt.timedelta,
    decimal.Decimal,
    uuid.UUID,
)


def timeout(what: str, value: object) -> float | None:
    """Return a timeout in seconds, None for one that never passes.

    Raises:
        ConfigError: It is no number, negative, NaN or too large for a float.
    """
    if value is None:
        return None
    seconds = value if type(value) is float else _real(value)
    if seconds is None or not seconds >= 0:
        raise ConfigError(f"{what}: expected seconds, not negative, or None, got {brief(value)}.")
    return None if seconds == math.inf else seconds


def whole(what: str, value: object, *, least: int = 0) -> int:
    """Return a whole number that is at least `least`.

    Raises:
        ConfigError: It is none.
    """
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{what}: expected a whole number, at least {least}, got {brief(value)}.")
    return number


def index(value: object) -> int:
    """Return a whole number as an int. NumPy's integers are whole numbers, and its flags are not.

    Before version 2.3, NumPy takes its True for 1 and warns.

    Raises:
        TypeError: It is no whole number, or a flag.
    """
    if isinstance(value, bool) or _is_flag(value):
        raise TypeError("a flag is no whole number")
    return int(operator.index(value))  # type: ignore[arg-type]


def flag(what: str, value: object) -> bool:
    """Return True or False, and nothing that only counts as one of them.

    Raises:
        ConfigError: It is neither.
    """
    if type(value) is bool:
        return value
    if _is_flag(value):
        return bool(value)
    raise ConfigError(f"{what}: expected True or False, got {brief(value)}.")


def flags(what: str, **given: object) -> None:
    """Check several flags of one call by their names."""
    for name, value in given.items():
        flag(f"{what}({name}=)", value)


def one_of(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that a value is one of a few words.

    Raises:
        ConfigError: It is none; the message lists them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"{what}: expected {' or '.join(map(repr, choices))}, got {brief(value)}."
        )


def function(what: str, value: object) -> None:
    """Check that a value is a function that can be asked for its parameters, `self` included.

    Raises:
        ConfigError: It is none, or a method of an object.
    """
    is_one = not inspect.ismethod(value)
    try:
        inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        is_one = False
    if not is_one:
        raise ConfigError(
            f"{what}: expected a function of a class, as in Encoder.forward, got {brief(value)}."
        )


def text(what: str, value: object) -> str:
    """Return a name that is not empty.

    Raises:
        ConfigError: It is no text, or empty.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what}: expected a name, got {brief(value)}.")
    return value


def name_of_file(path: str) -> str:
    """Return the name that a runner has by default: its file's stem.

    Bytes of the stem that are no text are escaped, since every report of a runner is text.
    """
    return Path(path).stem.encode("utf-8", "backslashreplace").decode()


def file_name(what: str, value: object) -> str:
    """Return a path as text, as the operating system takes it.

    Raises:
        ConfigError: It is no path, empty, or has a NUL or a letter that no file name can have.
    """
    try:
        path = os.fsdecode(value)  # type: ignore[arg-type]
        os.fsencode(path)
    except (TypeError, UnicodeError):
        raise ConfigError(f"{what}: expected the path of a file, got {brief(value)}.") from None
    if not path or "\0" in path:
        raise ConfigError(
            f"{what}: expected the path of a file, got {brief(path)}, which no file can have."
        )
    return path


def expanded(what: str, path: str) -> str:
    """Return the path with the home directory in the place of a leading `~` or `~user`.

    Raises:
        ConfigError: There is no such user, or no home directory is known.
    """
    # Pathlib's raises RuntimeError, and takes "./" away.
    home = os.path.expanduser(path)  # noqa: PTH111
    if path.startswith("~") and home == path:
        raise ConfigError(
            f"{what}: {path.partition('/')[0]!r} has no home directory here. Write the path in "
            "full."
        )
    return home


def converted(value: object, kind: type[_T], what: str) -> _T:
    """Return the value converted to the type of an annotation, as if it came from a file.

    Raises:
        ConfigError: It does not fit; the message says where.
    """
    try:
        plain = msgspec.to_builtins(value, enc_hook=_plain, builtin_types=_NOT_TEXT)
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        got = "" if path or "got" in message else f", got {brief(value)}"
        raise ConfigError(f"{what}{path}: {message}{got}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {brief(value)} can't be taken ({error})") from None


def checked_struct(given: _T, where: str) -> _T:
    """Return a struct with the same settings, each checked by its type.

    `where` precedes the settings' names in errors.
    """
    kind: Any = type(given)
    values = {}
    for field in msgspec.structs.fields(kind):
        value = getattr(given, field.name)
        if isinstance(value, msgspec.Struct):
            value = checked_struct(value, f"{where}{field.name}.")
        values[field.name] = converted(value, field.type, f"{where}{field.name}")
    return kind(**values)  # type: ignore[no-any-return]


def _plain(value: object) -> object:
    """Convert what msgspec does not know: numbers, flags and paths of other libraries."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if _is_flag(value):
        return bool(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    raise TypeError(f"a {type(value).__name__} is no setting")


def _real(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        return None


def _is_flag(value: object) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
