"""`python -m aoti_sched`: the command line, as the script `aoti-sched` has it."""

from __future__ import annotations

from aoti_sched.cli import main

if __name__ == "__main__":
    main()
