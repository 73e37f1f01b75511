"""The page docs/cli.md, made from the commands: `python -m aoti_sched.cli.docs > docs/cli.md`."""

from __future__ import annotations

import re
import sys
import textwrap

from aoti_sched.cli.app import make_app

_COLUMNS = 100

_HEAD = """\
# The command line

<!-- Generated: python -m aoti_sched.cli.docs > docs/cli.md -->

`pip install 'aoti_sched[cli]'` gives the script `aoti-sched`; `python -m aoti_sched` is the same.

```sh
aoti-sched compile models.py:Encoder -o encoder.pt2 --example int64[2,8]:0..99 --dynamic batch=1..64
aoti-sched inspect encoder.pt2
aoti-sched run encoder.pt2 --input 0=@tokens.npy --output vectors.npz
aoti-sched bench encoder.pt2 --clients 1,8,64 --budget p99=20ms --save monday.json
aoti-sched bench encoder.pt2 --rate 200 --poisson --batching --compare monday.json --plot bench.png
aoti-sched tune encoder.pt2 --p99 20ms --rate 200 --poisson --plot tune.png
aoti-sched simulate timeline.json --instances 2 --max-size 16 --max-delay 2ms
aoti-sched stats
aoti-sched top
aoti-sched timeline --seconds 5 -o run.json
aoti-sched weights stage ranker new.safetensors
aoti-sched weights commit ranker
aoti-sched doctor
aoti-sched cache prune --age 30d
```

`compile`, `run`, `bench` and `tune` run native code of the module or package: use them on what you
trust.
`inspect`, `simulate` and `cache` run none.

`stats`, `top`, `timeline` and `weights` look into a running process whose program calls
`await scheduler.expose()` ([observability.md](observability.md)).
Their `PROCESS` is a process id, a name, the path of a socket or `http://127.0.0.1:PORT`.
It may be left out where one scheduler of the user is exposed.

## Conventions

- Data goes to stdout, and progress, messages and errors go to stderr.
- `--json` prints a report with a `version`.
  A new field does not change the version; a change that breaks readers does.
- Colour is off for `NO_COLOR`, for `TERM=dumb`, and where the output is no terminal.
- An error is one sentence.
  `--debug` prints its traceback, and the library's log.
- An option also comes from an environment variable, `AOTI_SCHED_BENCH_TIME` for `bench --time`, and
  from the TOML file that `--config` or `AOTI_SCHED_CONFIG` names.
  The command line goes first, then the environment, then the file.
- Ctrl-C ends a command and leaves no half-written file.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | failure |
| 2 | wrong usage: an option, an argument or a setting |
| 3 | `bench`: a budget was missed; `tune`: no settings keep the budget |
| 130 | interrupted |

```toml
[bench]
clients = "1,8"
budget = ["p99=20ms", "throughput=100"]

[cache.prune]
age = "30d"
```

## Tuning

`tune` chooses the threads, instances, batches, delay and placement of a model on the CPU.

1. It measures short runs of the model for each number of threads and instances, with batches of
   each size, and what a request costs the event loop.
2. A simulation of the scheduler with these times (as in [What if](#what-if)) says what settings
   would do at the rate.
   A search climbs towards the best of them, and simulates 60 at most.
3. Real runs confirm the best few, as `bench --rate` measures, and only these decide.

```console
$ aoti-sched tune encoder.pt2 --p99 20ms --rate 200                        # the lowest p99 at 200/s
$ aoti-sched tune encoder.pt2 --p99 20ms --rate 200 --maximize throughput  # the highest rate
```

The best settings are written to `scheduler.toml`, which `Scheduler.from_config` reads.
Where no settings keep the budget, nothing is written, and the trial that came nearest is named.
`max_size` counts requests of the size that was tuned with, and the file counts rows.

What the simulation leaves out is the noise of the machine: the measured 99th percentile is higher
than the simulated one where other processes have the cores.

## What if

`simulate` replays a recording without the models: how would the same requests have fared with
another instance, larger batches, a delay, or twice the load?

```python
with scheduler.record() as recording:
    ...
recording.save("timeline.json")
```

The requests come when they came, with their priority, tenant and deadline, and leave when they
left.
The scheduler that decides is the one that serves, on an event loop whose time jumps from timer to
timer; no torch is needed.
The report has three columns: what was recorded, the simulation of the recorded settings, and the
simulation of yours.
The first two differ by what a simulation leaves out; where they differ by more than a fifth, a
message says so, and only the two simulations can be compared.
They agree to 10 ns where the recording is a simulation itself and began with the scheduler.

- A run that the simulation makes as it was made takes the time that was recorded for it.
- Another run of a recorded size takes a recorded time of that size.
- Times between two recorded sizes are interpolated; times beyond them are extrapolated, in
  proportion to the size where a single size was recorded.
  The report says how many runs took which kind of time.
- Left out: the event loop's own work, hops between threads, what runs on neighbouring cores cost
  each other, held leases, updates of weights, and runs that failed.
- All requests of a model count as equally large, and what the scheduler had learned before the
  recording began is learned anew.

"""


def page() -> str:
    """Return the page."""
    text = make_app().generate_docs(heading_level=1, max_heading_level=3)
    body = text[text.index("**Options of all commands**") :]
    shared, _, commands = body.partition("\n## ")
    commands = f"## {commands}".replace(f"{shared.strip()}\n", "")
    commands = re.sub(r"\n{3,}", "\n\n", commands)
    lines = [line for part in (shared, commands) for line in [*_wrapped(part), ""]]
    return _HEAD + "\n".join(lines).rstrip() + "\n"


def _wrapped(text: str) -> list[str]:
    """Return the lines of a part; the text of an entry of a list is filled anew."""
    lines: list[str] = []
    for line in text.strip().split("\n"):
        if line.startswith("    ") and lines and lines[-1].startswith("* "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    filled: list[str] = []
    for line in lines:
        indent = "  " if line.startswith("* ") else ""
        wrapped = textwrap.wrap(
            line,
            _COLUMNS,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        filled += wrapped or [""]
    return filled


if __name__ == "__main__":
    sys.stdout.write(page())
