"""Whatever is passed: it works, or it is refused at once with an error of ours that names the
argument.
"""

from __future__ import annotations

import asyncio
import fractions
import io
import math
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aoti_sched import (
    AotiSchedError,
    Batching,
    ConfigError,
    DeviceConfig,
    DynamicDim,
    Limits,
    ModelConfig,
    Priority,
    Scheduler,
    SchedulerConfig,
    TensorSpec,
    WeightsTypeError,
)
from aoti_sched.testing import FakeBackend

RECURSIVE: list[object] = []
RECURSIVE.append(RECURSIVE)


class Rude:
    """An object that nothing can be done with, not even shown."""

    def __repr__(self):
        raise RuntimeError("rude")

    __str__ = __hash__ = __bool__ = __eq__ = __len__ = __repr__


NONSENSE = {
    "an object": Rude(),
    "a type": int,
    "None": None,
    "bytes": b"x",
    "text": "nonsense",
    "empty text": "",
    "control characters": "a\x1b\n\0",
    "a lone surrogate": "\ud800",
    "True": True,
    "NumPy's True": np.True_,
    "a negative": -1,
    "zero": 0,
    "half": 0.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "NumPy's NaN": np.float32("nan"),
    "NumPy's -1": np.int64(-1),
    "NumPy's 3": np.int64(3),
    "NumPy's 0.5": np.float32(0.5),
    "a fraction": fractions.Fraction(1, 2),
    "a googol of digits": 10**400,
    "2**63": 1 << 63,
    "an empty list": [],
    "an empty dict": {},
    "a list of itself": RECURSIVE,
    "a large list": list(range(100_000)),
    "an array": np.arange(10),
    "a set": {1},
}
COUNTS = {"NumPy's 3"}
SECONDS = {"half", "NumPy's 3", "NumPy's 0.5", "a fraction", "infinity", "2**63"}
FLAGS = {"True", "NumPy's True"}
# For each argument of `load`, which of these are right.
LOAD = {
    "name": {"text", "control characters", "None"},
    "model_name": {"text", "empty text", "control characters", "a lone surrogate", "None"},
    "device": set(),
    "devices": {"None"},
    "instances": COUNTS,
    "threads": COUNTS | {"None"},
    "share": SECONDS - {"infinity", "2**63"},
    "overflow": set(),
    "admission": set(),
    "on_failure": set(),
    "limits": {"None", "an empty dict"},
    "timeout": SECONDS | {"None"},
    "placement": set(),
    "inline_limit": SECONDS,
    "batching": {"None", "an empty dict"} | FLAGS,
    "warmup": FLAGS,
    "copy_inputs": FLAGS,
    "copy_outputs": {"None"},
    "cuda_graphs": set(),
    "sha256": {
        "text",
        "empty text",
        "control characters",
        "a lone surrogate",
        "None",
    },  # a fake has none
    "inputs": {"None"},
    "weights": {"None", "an empty dict"},
    "weights_strict": FLAGS,
    "warmup_inputs": {"None"},
}
OPTIONS = {
    "priority": {"None", "zero"},
    "timeout": SECONDS | {"None", "zero"},
    "min_epoch": {"None", "zero"},
}
REFUSED_LATER = {
    "min_epoch": {"True", "NumPy's 3", "2**63", "a googol of digits"}
}  # they wait for that epoch


def cases(table):
    return [
        pytest.param(argument, value, value in right, id=f"{argument}-{value}")
        for argument, right in table.items()
        for value in NONSENSE
        if (argument, value) != ("inputs", "an empty list")  # the specs of a model without inputs
    ]


@pytest.fixture
async def scheduler():
    async with Scheduler(devices={"cpu": FakeBackend({"m": lambda x: x}, auto=True)}) as scheduler:
        yield scheduler


async def must_refuse(call, argument):
    """The call raises an error of ours, on a screen and printable, that names the argument."""
    with pytest.raises(AotiSchedError) as caught:
        await asyncio.wait_for(call, 30)
    text = str(caught.value)
    assert re.search(rf"\b{argument}\b", text), text
    assert len(text) < 500
    assert text.isprintable()


@pytest.mark.parametrize(("argument", "value", "right"), cases(LOAD))
async def test_any_argument_of_load_works_or_is_refused(scheduler, argument, value, right):
    call = scheduler.load("m.pt2", **{argument: NONSENSE[value]})
    if right:
        runner = await call
        assert await asyncio.wait_for(runner.run(7), 30) == 7
    else:
        await must_refuse(call, "devices?" if argument == "devices" else argument)
        assert dict(scheduler.runners) == {}
        assert await (await scheduler.load("m.pt2")).run(7) == 7


@pytest.mark.parametrize(("argument", "value", "right"), cases(OPTIONS))
async def test_any_argument_of_options_works_or_is_refused(scheduler, argument, value, right):
    runner = await scheduler.load("m.pt2")
    given = NONSENSE[value]
    if argument == "min_epoch" and value in ("NumPy's 3", "2**63", "a googol of digits"):
        assert int(runner.options(min_epoch=given)._options.min_epoch) == int(given)
    elif argument == "timeout" and value == "zero":
        runner.options(timeout=0)
    elif right:
        assert await asyncio.wait_for(runner.options(**{argument: given}).run(7), 30) == 7
    else:

        async def call():
            runner.options(**{argument: given})

        await must_refuse(call(), argument)


UPDATES = {
    "update": {
        "partial": FLAGS,
        "strict": FLAGS,
        "fold": FLAGS,
        "keep_previous": FLAGS,
        "check_finite": FLAGS,
        "barrier": set(),
        "timeout": SECONDS | {"None"},
    },
    "stage": {"partial": FLAGS, "strict": FLAGS, "fold": FLAGS, "check_finite": FLAGS},
    "commit": {"keep_previous": FLAGS, "barrier": set()},
    "rollback": {"barrier": set()},
    "extract": {"inactive": FLAGS},
}


@pytest.mark.parametrize("method", UPDATES)
async def test_any_argument_of_an_update_works_or_is_refused(method):
    backend = FakeBackend({"m": lambda x: x}, weights={"m": {"w": 1}}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("m.pt2")
        given = ({"w": 2},) if method in ("update", "stage") else ()
        for argument, right in UPDATES[method].items():
            for value, what in NONSENSE.items():
                if value in right:
                    if method in ("update", "commit", "rollback", "extract"):
                        await runner.update({"w": 3})
                    if method == "commit":
                        await runner.stage({"w": 4})
                    await getattr(runner, method)(*given, **{argument: what})
                elif value != "zero" or argument != "timeout":
                    epoch = runner.epoch
                    await must_refuse(getattr(runner, method)(*given, **{argument: what}), argument)
                    assert runner.epoch == epoch


@pytest.mark.parametrize(
    "value", [value for value in NONSENSE if value not in ("an empty dict", "an empty list")]
)
async def test_what_are_no_weights_is_refused_by_a_fake_too(value):
    backend = FakeBackend({"m": lambda x: x}, weights={"m": {"w": 1}}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("m.pt2")
        before = runner.epoch
        await must_refuse(runner.update(NONSENSE[value]), "weights")
        assert (runner.epoch, await runner.run(7)) == (before, 7)


async def test_a_fake_refuses_a_weights_file_which_it_cannot_read(scheduler, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(WeightsTypeError, match="the fake backend reads no file"):
        await scheduler.load("m.pt2", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", NONSENSE)
async def test_an_update_of_something_else_than_runners_is_refused(scheduler, value):
    for call in (
        scheduler.update(NONSENSE[value]),
        scheduler.commit(NONSENSE[value]),
        scheduler.rollback(NONSENSE[value]),
    ):
        if value == "an empty dict" and call.__name__ == "update":
            with pytest.raises(AotiSchedError, match="no runner was given"):
                await call
        else:
            await must_refuse(call, "changes|runner")


async def test_a_view_of_a_runner_is_no_runner_to_update(scheduler):
    runner = await scheduler.load("m.pt2")
    with pytest.raises(
        ConfigError,
        match=r"expected the runner that load\(\) returned, got <RunnerView 'm' on cpu>",
    ):
        await scheduler.commit(runner.options(timeout=1))


@pytest.mark.parametrize("value", NONSENSE)
async def test_draining_something_else_than_a_device_is_refused(scheduler, value):
    await must_refuse(scheduler.drain_device(NONSENSE[value]), "drain_device")


# --- structs --------------------------------------------------------------------------------------

STRUCTS = {
    DeviceConfig: {
        "lanes": COUNTS | {"None"},
        "cores": COUNTS | {"None"},
        "max_wait": SECONDS | {"None", "zero"},
        "affinity": {"None", "an empty list", "a set"},
        "launchers": COUNTS | {"None"},
        "limits": {"an empty dict"},
        "memory_limit": COUNTS | {"None"},
        "evict": {"None"},
    },
    Limits: {name: COUNTS | {"None"} for name in ("jobs", "bytes", "tenant_jobs")},
    Batching: {
        "max_size": COUNTS | {"None"},
        "max_delay": SECONDS - {"infinity", "2**63"} | {"zero"},
        "dim": COUNTS | {"None", "zero"},
        "pad_to": {"None", "a set"},
        "ragged": {"an empty dict"},
        "detach_rows": FLAGS,
        "assume_independent": FLAGS,
    },
}


@pytest.mark.parametrize("kind", STRUCTS)
async def test_any_setting_in_a_struct_works_or_is_refused(kind):
    for setting, right in STRUCTS[kind].items():
        for value, what in NONSENSE.items():
            given = kind(**{setting: what})
            backend = FakeBackend({"m": lambda x: x}, auto=True)

            async def call(given=given, backend=backend):
                config, options = SchedulerConfig(), {}
                if kind is DeviceConfig:
                    config = SchedulerConfig(devices={"cpu": given})
                else:
                    options["limits" if kind is Limits else "batching"] = given
                async with Scheduler(config, devices={"cpu": backend}) as scheduler:
                    await scheduler.load("m.pt2", **options)

            if value not in right:
                await must_refuse(call(), setting)
            elif (setting, value) != ("affinity", "an empty list"):  # no core for two lanes
                await call()


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("setting", ["devices", "models", "log_requests", "cache_dir", "config"])
def test_any_setting_of_a_scheduler_works_or_is_refused(setting, value):
    right = {
        "devices": {"an empty dict"},
        "models": {"an empty dict"},
        "log_requests": FLAGS,
        "cache_dir": {"None", "text", "bytes"},
        "config": {"None"},
    }
    given = NONSENSE[value]
    make = (
        (lambda: Scheduler(given))
        if setting == "config"
        else lambda: Scheduler(SchedulerConfig(**{setting: given}))
    )
    if value in right[setting]:
        make()
    else:
        with pytest.raises(ConfigError, match=setting):
            make()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            SchedulerConfig(devices={"cpu": DeviceConfig(lanes=0)}),
            r"^devices\.cpu\.lanes: Expected `int` >= 1, got 0$",
        ),
        (
            SchedulerConfig(devices={"cpu": 3}),
            "^devices: expected DeviceConfig by name, got {'cpu': 3}",
        ),
        (
            SchedulerConfig(models={3: ModelConfig(path="m")}),
            "^models: expected ModelConfig by name, got {3: ",
        ),
        (
            SchedulerConfig(models={"m": ModelConfig(path="m", limits=Limits(jobs=-1))}),
            r"^models\.m\.limits\.jobs: Expected `int` >= 1, got -1$",
        ),
    ],
)
def test_settings_given_in_code_are_checked_when_the_scheduler_is_made(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Scheduler(config)


@pytest.mark.parametrize(
    "spec",
    [
        3,
        "x",
        TensorSpec(3, "float32", (1,)),
        TensorSpec("x", 3, (1,)),
        TensorSpec("x", "float32", 3),
        TensorSpec("x", "float32", (-1,)),
        TensorSpec("x", "float32", ("rows",)),
        TensorSpec("x", "float32", (math.nan,)),
        TensorSpec("x", "float32", (True,)),
        TensorSpec("x", "float32", (DynamicDim("n", -1),)),
        TensorSpec("x", "float32", (DynamicDim("n", 5, 4),)),
        TensorSpec("x", "float32", (DynamicDim("n", scale="x"),)),
        TensorSpec("x", "float32", (10**30,)),
        TensorSpec("x", "float32", (1,), device=3),
        TensorSpec("x", "float32", (1,), order="x"),
    ],
)
async def test_specs_that_no_tensor_could_meet_are_refused(scheduler, spec):
    await must_refuse(scheduler.load("m.pt2", inputs=[spec]), "inputs")


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["m.pt2", Path("m.pt2"), b"m.pt2", type("P", (), {"__fspath__": lambda _: b"m.pt2"})()]
)
async def test_a_path_may_be_any_that_the_operating_system_takes(scheduler, path):
    runner = await scheduler.load(path)
    assert (runner.name, runner.info.path) == ("m", "m.pt2")


@pytest.mark.parametrize("value", [name for name in NONSENSE if name not in ("text", "bytes")])
async def test_what_is_no_path_is_refused(scheduler, value):
    await must_refuse(scheduler.load(NONSENSE[value]), "path")


async def test_an_open_file_is_refused_with_the_way_out(scheduler, tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"PK\3\4")
    with (
        (tmp_path / "m.pt2").open("rb") as file,
        pytest.raises(ConfigError, match=r"path, or its bytes: load\(file.read"),
    ):
        await scheduler.load(file)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
async def test_bytes_that_are_no_package_are_refused_and_not_shown(scheduler, wrap):
    with pytest.raises(ConfigError, match="these 1000000 bytes are neither a package"):
        await scheduler.load(wrap(b"x" * 1_000_000))


async def test_the_name_of_a_runner_can_be_written(tmp_path):
    """Linux takes any bytes as the name of a file, and JSON none that are no text."""
    async with Scheduler(devices={"cpu": FakeBackend({r"caf\udce9": len}, auto=True)}) as scheduler:
        with pytest.raises(ConfigError, match=r"'.udce9' can't be a name, .*; give it another"):
            await scheduler.load("m.pt2", name="\udce9")
        runner = await scheduler.load(b"caf\xe9.pt2")
        assert runner.name == r"caf\udce9"
        with scheduler.record() as recording:
            assert await runner.run("ab") == 2
        recording.save(tmp_path / "timeline.json")
        scheduler.flight_record().save(tmp_path / "report.json")
        assert msgspec.json.encode(scheduler.stats())


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
async def test_a_package_in_memory_reaches_the_device(wrap):
    seen = []

    class Backend(FakeBackend):
        def inspect(self, request):
            seen.append(request)
            return super().inspect(request)

    async with Scheduler(devices={"cpu": Backend({"model": len}, auto=True)}) as scheduler:
        given = wrap(b"PK\x03\x04 and so on")
        runner = await scheduler.load(given)
        assert (runner.name, runner.info.path) == ("model", "model.pt2 (in memory)")
        with pytest.raises(
            ConfigError, match="a runner named 'model' exists; give it another name="
        ):
            await scheduler.load(given)
    assert seen[0].contents == b"PK\x03\x04 and so on"


async def test_priorities_are_taken_by_name_and_by_number(scheduler):
    runner = await scheduler.load("m.pt2")
    for priority in (Priority.HIGH, 0, np.int64(0)):
        assert runner.options(priority=priority)._options.priority is Priority.HIGH


@pytest.mark.parametrize("value", ["soon", -1, True, 10**400])
async def test_a_timeout_that_is_refused_is_shown_as_it_was_given(value):
    async with Scheduler(devices={"cpu": FakeBackend({"m": lambda: 1})}) as scheduler:
        runner = await scheduler.load("m.pt2")
        with pytest.raises(ConfigError, match=re.escape(f"got {value!r}"[:20])):
            runner.options(timeout=value)
