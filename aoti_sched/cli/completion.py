"""`aoti-sched completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import sys

from aoti_sched.cli.app import NAME, Shell, make_app


def completion_command(shell: Shell, /) -> None:
    """Print a script that completes the commands and options in a shell.

    For bash: `aoti-sched completion bash > ~/.local/share/bash-completion/completions/aoti-sched`.
    For zsh, write it to a file `_aoti-sched` in a folder of `$fpath`.
    For fish: `aoti-sched completion fish > ~/.config/fish/completions/aoti-sched.fish`.

    Args:
        shell: The shell.
    """
    sys.stdout.write(make_app().generate_completion(prog_name=NAME, shell=shell))
