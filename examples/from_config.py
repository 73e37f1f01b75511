"""The models in a file: `scheduler.toml` says what is loaded and how, the code only uses it.

python -m examples.from_config
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import aoti_sched

from .colours import COLOURS, eye_package, namer_package, names, photo_of

CONFIG = Path(__file__).with_name("scheduler.toml")


async def main() -> None:
    # Read and checked here; a wrong setting is a ConfigError that names it. The models load on
    # entry.
    async with aoti_sched.Scheduler.from_config(CONFIG) as scheduler:
        for runner in scheduler.runners.values():
            info = runner.info
            inputs = ", ".join(str(spec) for spec in info.inputs)
            print(
                f"{runner.name:<6} {info.instances} instance(s) of {info.threads} thread(s), "
                f"takes {inputs}"
            )

        eye, namer = scheduler.runners["eye"], scheduler.runners["namer"]
        for colour in COLOURS:
            rgb = await eye.run(photo_of(colour))
            print(f"a photo of something {colour:<6} is called {names(await namer.run(rgb))[0]}")


if __name__ == "__main__":
    eye_package()
    namer_package()
    asyncio.run(main())
