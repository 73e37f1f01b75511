"""Options: the kinds that commands share, and options from a TOML file.

The file has a table for each command, and in it an entry for each option.

[bench]
clients = "1,8,64"
budget = ["p99=20ms"]

[cache.prune]
age = "30d"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from aoti_sched.cli.failures import UsageError

_LARGEST = 1 << 20

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
"""An option without a value."""
Texts = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
"""An option that may be repeated."""


def read_options(path: Path, commands: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in a file, by command.

    Args:
        path: The file.
        commands: The names of the commands, with those below them; None below a plain command.

    Raises:
        UsageError: The file can't be read, is no TOML, or names a command that does not exist.
    """
    import msgspec

    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise UsageError(f"{path}: the options can't be read: {error.strerror}.") from error
    if len(content) > _LARGEST:
        raise UsageError(f"{path}: larger than {_LARGEST} bytes. Options are a few lines of TOML.")
    try:
        options: dict[str, Any] = msgspec.toml.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no TOML: {error}.") from error
    _check(path, options, commands, "")
    return options


def _check(path: Path, table: dict[str, Any], commands: Mapping[str, Any], place: str) -> None:
    for name, value in table.items():
        if name not in commands:
            known = ", ".join(commands)
            raise UsageError(f"{path}: {place}{name}: no command. The commands are {known}.")
        if not isinstance(value, dict):
            raise UsageError(f"{path}: {place}{name}: expected a table of options.")
        if commands[name] is not None:
            _check(path, value, commands[name], f"{place}{name}.")
