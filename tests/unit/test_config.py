"""Settings: TOML in, checked, each fault told with its place; a scheduler loads the models that
a file names.
"""

import datetime as dt
import json
import re
from pathlib import Path

import msgspec
import pytest
import structlog

from aoti_sched import Scheduler
from aoti_sched.config import (
    DeviceConfig,
    Limits,
    ModelConfig,
    SchedulerConfig,
    checked,
    cores_of,
    divided,
    in_full,
)
from aoti_sched.config_file import SIZES, TIMES, read_config, schema
from aoti_sched.errors import ConfigError, PackageNotFoundError, QueueFullError, RunnerClosedError
from aoti_sched.testing import FakeBackend


@pytest.fixture
def write(tmp_path):
    """Write a configuration and return its path."""

    def write(text):
        file = tmp_path / "scheduler.toml"
        file.write_text(text)
        return file

    return write


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


# --- reading --------------------------------------------------------------------------------------


def test_an_empty_file_gives_the_defaults(write):
    assert read_config(write("")) == SchedulerConfig()


def test_every_setting_is_read(write, tmp_path):
    config = read_config(
        write("""
            cache_dir = "/var/cache/models"
            log_requests = true

            [devices.cpu]
            lanes = 2
            limits = { jobs = 2048, bytes = 268435456 }

            [models.encoder]
            path = "encoder.pt2"
            model_name = "small"
            device = "cpu"
            instances = 2
            threads = 3
            overflow = "wait"
            limits = { jobs = 5 }
            timeout = 0.5
            warmup = false
            sha256 = "abc"
        """)
    )
    assert config == SchedulerConfig(
        cache_dir="/var/cache/models",
        log_requests=True,
        devices={"cpu": DeviceConfig(lanes=2, limits=Limits(2048, 268435456))},
        models={
            "encoder": ModelConfig(
                path=str(tmp_path / "encoder.pt2"),
                model_name="small",
                device="cpu",
                instances=2,
                threads=3,
                overflow="wait",
                limits=Limits(5),
                timeout=0.5,
                warmup=False,
                sha256="abc",
            )
        },
    )


def test_the_example_in_the_documentation_is_valid(write):
    import aoti_sched.config_file

    file = write("cache_dir" + aoti_sched.config_file.__doc__.partition("cache_dir")[2])
    touch(file.parent / "packages", "ranker.pt2", "reader.pt2")
    config = read_config(file)
    assert list(config.models) == ["encoder", "ranker", "reader"]
    assert {(model.overflow, model.timeout) for model in config.models.values()} == {("wait", 0.5)}
    assert config.devices["cpu"].memory_limit == 4 << 30


def test_paths_are_relative_to_the_file_and_not_to_the_process(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "scheduler.toml").write_text('[models.m]\npath = "../models/m.pt2"\n')
    monkeypatch.chdir(tmp_path)
    path = Path(read_config("conf/scheduler.toml").models["m"].path)
    assert path == Path("conf/../models/m.pt2")


def test_a_home_directory_may_be_written_as_a_tilde(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = read_config(write('cache_dir = "~/cache"\n[models.m]\npath = "~/m.pt2"\n'))
    assert config.models["m"].path == f"{tmp_path}/home/m.pt2"
    assert config.cache_dir == f"{tmp_path}/home/cache"
    assert (
        Scheduler(SchedulerConfig(cache_dir="~/cache"))._config.cache_dir
        == f"{tmp_path}/home/cache"
    )


def test_the_cache_directory_is_relative_to_the_file(write, tmp_path):
    assert read_config(write('cache_dir = "cache"\n')).cache_dir == f"{tmp_path}/cache"


@pytest.mark.parametrize("path", ["a\0b", "", "\ud800", None, 3])
def test_what_is_no_path_is_no_configuration(path):
    with pytest.raises(ConfigError, match="the configuration: expected the path of a file, got"):
        read_config(path)


def test_an_endless_file_is_no_configuration():
    with pytest.raises(ConfigError, match="/dev/zero: larger than 16777216 bytes"):
        read_config("/dev/zero")


def test_absolute_paths_are_left_alone(write):
    assert read_config(write('[models.m]\npath = "/srv/m.pt2"\n')).models["m"].path == "/srv/m.pt2"


def test_whole_seconds_may_be_written_without_a_point(write):
    timeout = read_config(write('[models.m]\npath = "m.pt2"\ntimeout = 2\n')).models["m"].timeout
    assert timeout == 2.0


def test_a_device_bounds_its_queue_even_when_nothing_is_said(write):
    assert read_config(write("[devices.cpu]\n")).devices["cpu"].limits == Limits(
        jobs=4096, bytes=None
    )


def test_a_configuration_crosses_a_wire(write):
    config = read_config(write('[models.m]\npath = "m.pt2"\n[devices.cpu]\nlanes = 2\n'))
    assert msgspec.json.decode(msgspec.json.encode(config), type=SchedulerConfig) == config


# --- defaults, patterns, sizes and times ---------------------------------------------------------


def test_a_model_has_the_defaults_where_its_own_table_has_no_other(write):
    config = read_config(
        write("""
            [defaults]
            instances = 2
            limits = { jobs = 8, bytes = "1 KiB" }
            [models.a]
            path = "a.pt2"
            [models.b]
            path = "b.pt2"
            instances = 1
            limits = { jobs = 4 }
        """)
    )
    assert config.models["a"].instances == 2
    assert config.models["a"].limits == Limits(8, 1024)
    assert config.models["b"].instances == 1
    assert config.models["b"].limits == Limits(4)  # a table is replaced as a whole


def test_a_pattern_makes_a_runner_of_each_file_by_its_stem(write, tmp_path):
    touch(tmp_path / "packages", "b.pt2", "a.pt2", "notes.txt")
    (tmp_path / "packages" / "folder.pt2").mkdir()
    config = read_config(write('models = "packages/*.pt2"\n[defaults]\ninstances = 2\n'))
    assert list(config.models) == ["a", "b"]
    assert config.models["a"] == ModelConfig(path=str(tmp_path / "packages/a.pt2"), instances=2)


def test_several_patterns_may_match_the_same_file(write, tmp_path):
    touch(tmp_path / "packages", "a.pt2", "b.pt2")
    config = read_config(write('models = ["packages/*.pt2", "packages/a.*"]'))
    assert list(config.models) == ["a", "b"]


def test_a_pattern_without_signs_of_one_is_a_path(write, tmp_path):
    assert list(read_config(write('models = ["packages/a.pt2"]')).models) == ["a"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(write, tmp_path):
    touch(tmp_path, "m[1].pt2", "m1.pt2")
    config = read_config(write('[models.m]\npath = "m[1].pt2"'))
    assert config.models["m"].path == str(tmp_path / "m[1].pt2")


def test_a_table_of_its_own_goes_before_a_pattern(write, tmp_path):
    touch(tmp_path, "a.pt2", "b.pt2", "c.pt2")
    config = read_config(
        write("""
            [models.all]
            path = "*.pt2"
            share = 2.0
            [models.a]
            path = "elsewhere/a.pt2"
            [models.renamed]
            path = "b.pt2"
        """)
    )
    assert {name: model.share for name, model in config.models.items()} == {
        "a": 1.0,
        "renamed": 1.0,
        "c": 2.0,
    }


def test_two_files_of_one_stem_are_refused(write, tmp_path):
    touch(tmp_path / "old", "a.pt2")
    touch(tmp_path / "new", "a.pt2")
    with pytest.raises(ConfigError, match=r"old/a.pt2 and .*new/a.pt2 would both be .* 'a'"):
        read_config(write('models = ["new/*.pt2", "old/*.pt2"]'))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1 B", 1), ("2 kB", 2000), ("2 KiB", 2048), ("1.5GiB", 3 << 29), (" 2 TB ", 2 * 10**12)],
)
def test_a_size_may_have_a_unit(write, text, size):
    assert read_config(write(f'[devices.cpu]\nmemory_limit = "{text}"')).devices["cpu"] == (
        DeviceConfig(memory_limit=size)
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50 ms", 0.05),
        ("50us", 5e-5),
        ("7 µs", 7e-6),
        ("1.5 s", 1.5),
        ("2 min", 120),
        ("1 h", 3600),
    ],
)
def test_a_time_may_have_a_unit(write, text, seconds):
    model = read_config(write(f'[models.m]\npath = "m"\ntimeout = "{text}"')).models["m"]
    assert model.timeout == pytest.approx(seconds)


# --- the schema -----------------------------------------------------------------------------------

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "scheduler.schema.json"


def test_the_schema_in_the_docs_is_that_of_the_settings():
    # python -m aoti_sched.config_file > docs/scheduler.schema.json
    assert json.loads(SCHEMA.read_bytes()) == schema()


def test_the_schema_has_every_setting_with_a_unit():
    parts = schema()["$defs"]
    described = {
        key
        for part in parts.values()
        for key, value in part.get("properties", {}).items()
        if any("pattern" in kind for kind in value.get("anyOf", ()))
    }
    assert described == SIZES | TIMES


# --- faults ---------------------------------------------------------------------------------------

FAULTS = {
    "an unknown setting": ("lanes = 2", "Object contains unknown field `lanes`"),
    "a wrong type": ('log_requests = "yes"', "log_requests: Expected `bool`, got `str`"),
    "a section of the wrong type": (
        "models = 3",
        "models: expected a table of models, or patterns of files, got 3.",
    ),
    "an entry of the wrong type": ("[models]\nm = 3", "models.m: expected a table, got 3."),
    "a pattern that is no text": ("models = [3]", "models.path: Expected `str`, got `int`"),
    "defaults of the wrong type": ("defaults = 3", "defaults: expected a table, got 3."),
    "an unknown setting among the defaults": (
        "[defaults]\nlane = 1",
        "defaults: Object contains unknown field `lane`",
    ),
    "a default out of range": (
        "[defaults]\ninstances = 0",
        "defaults.instances: Expected `int` >= 1",
    ),
    "a path for all models": (
        '[defaults]\npath = "m.pt2"',
        "defaults.path: belongs to one model. Write it in the model's own table.",
    ),
    "a size without a unit that is known": (
        '[devices.cpu]\nmemory_limit = "2 GiX"',
        "devices.cpu.memory_limit: '2 GiX' is not a size. Write a number, or a number and a unit",
    ),
    "a size without a number": (
        '[models.m]\npath = "m"\nlimits = { bytes = "GiB" }',
        "models.m.limits.bytes: 'GiB' is not a size.",
    ),
    "a size of nothing": (
        '[models.m]\npath = "m"\nlimits = { bytes = "0.2 B" }',
        "models.m.limits.bytes: Expected `int` >= 1",
    ),
    "a time without a unit": (
        '[models.m]\npath = "m"\ntimeout = "50"',
        "models.m.timeout: '50' is not a time. Write a number, or a number and a unit",
    ),
    "a time that is negative": (
        '[models.m]\npath = "m"\ntimeout = "-1 s"',
        "models.m.timeout: '-1 s' is not a time.",
    ),
    "a time that is too long": (
        '[models.m]\npath = "m"\nbatching = { max_delay = "2 h" }',
        "models.m.batching.max_delay: Expected `float` <= 3600.0",
    ),
    "a pattern that matches nothing": (
        'models = "nothing/*.pt2"',
        "models: no file matches 'nothing/*.pt2'.",
    ),
    "an unknown setting of a model": (
        '[models.m]\npath = "m"\nlane = 1',
        "models.m: Object contains unknown field `lane`",
    ),
    "a missing path": (
        "[models.m]\ninstances = 2",
        "models.m: Object missing required field `path`",
    ),
    "no instances": (
        '[models.m]\npath = "m"\ninstances = 0',
        "models.m.instances: Expected `int` >= 1",
    ),
    "no threads": ('[models.m]\npath = "m"\nthreads = 0', "models.m.threads: Expected `int` >= 1"),
    "a timeout of nothing": (
        '[models.m]\npath = "m"\ntimeout = 0.0',
        "models.m.timeout: Expected `float` > 0.0",
    ),
    "a timeout that is no number": (
        '[models.m]\npath = "m"\ntimeout = nan',
        "models.m.timeout: Expected `float` > 0.0",
    ),
    "an unknown overflow": (
        '[models.m]\npath = "m"\noverflow = "drop"',
        "models.m.overflow: Invalid enum value 'drop'",
    ),
    "a bound out of range": (
        '[models.m]\npath = "m"\nlimits = { jobs = 0 }',
        "models.m.limits.jobs: Expected `int` >= 1",
    ),
    "a bound of the wrong type": (
        "[devices.cpu]\nlimits = { bytes = 1.5 }",
        "devices.cpu.limits.bytes: Expected `int | null`, got `float`",
    ),
    "more instances than any machine has": (
        '[models.m]\npath = "m"\ninstances = 1000000',
        "models.m.instances: Expected `int` <= 1024",
    ),
    "a batch that is never started": (
        '[models.m]\npath = "m"\nbatching = { max_delay = inf }',
        "models.m.batching.max_delay: Expected `float` <= 3600.0",
    ),
    "a path with a NUL": (
        '[models.m]\npath = "a\\u0000b"',
        "models.m.path: expected the path of a file, got 'a\\x00b'",
    ),
    "an empty path": (
        '[models.m]\npath = ""',
        "models.m.path: expected the path of a file, got ''",
    ),
    "a cache directory with a NUL": (
        'cache_dir = "\\u0000"',
        "cache_dir: expected the path of a file",
    ),
    "the home of nobody": (
        'cache_dir = "~nosuchuser/x"',
        "cache_dir: '~nosuchuser' has no home directory here",
    ),
    "the home of nobody for a model": (
        '[models.m]\npath = "~nosuchuser/m.pt2"',
        "models.m.path: '~nosuchuser' has no home directory here",
    ),
    "arrays in arrays without end": (f"a = {'[' * 100_000}", "nested too deeply"),
    "tables in tables without end": (f"a = {'{a=' * 100_000}", "nested too deeply"),
    "no lanes": ("[devices.cpu]\nlanes = 0", "devices.cpu.lanes: Expected `int` >= 1"),
    "an unknown setting of a device": (
        "[devices.cpu]\nkernels = 2",
        "devices.cpu: Object contains unknown field `kernels`",
    ),
}


@pytest.mark.parametrize(("text", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_with_the_file_and_its_place(write, text, words):
    file = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{file}: {words}')}"):
        read_config(file)


def test_among_several_models_the_one_at_fault_is_named(write):
    file = write('[models.good]\npath = "a"\n[models.bad]\npath = 3\n[models.fine]\npath = "b"\n')
    with pytest.raises(ConfigError, match=r"models\.bad\.path: Expected `str`, got `int`"):
        read_config(file)


@pytest.mark.parametrize("content", [b"[models", b"a = ", b"a = 1\na = 2", b"\xff\xfe", b"\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path, content):
    file = tmp_path / "scheduler.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: "):
        read_config(file)


def test_a_missing_file_is_named(tmp_path):
    file = tmp_path / "nothing.toml"
    with pytest.raises(
        ConfigError, match=f"{re.escape(str(file))}: the configuration can't be read: No such file"
    ):
        read_config(file)


def test_a_directory_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="the configuration can't be read: Is a directory"):
        read_config(tmp_path)


def test_settings_given_in_code_are_checked_like_those_of_a_file():
    with pytest.raises(
        ConfigError, match=r"load\('m.pt2'\): instances: Expected `int` >= 1, got 0"
    ):
        checked(ModelConfig(path="m.pt2", instances=0))


def test_valid_settings_given_in_code_are_left_as_they_are():
    settings = ModelConfig(path="m.pt2", timeout=0.5, limits=Limits(7, 8))
    assert checked(settings) == settings


# --- a scheduler from a file ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


TWO_MODELS = """
    [devices.cpu]
    lanes = 3

    [models.encoder]
    path = "encoder.pt2"
    timeout = 7.0

    [models.ranker]
    path = "ranker-v2.pt2"
    limits = { jobs = 1 }
"""


def backend(**options):
    return FakeBackend({"encoder": len, "ranker": sorted}, **options)


async def test_a_schedulers_models_are_loaded_on_entry_under_their_names(write):
    fake = backend(auto=True)
    async with Scheduler(read_config(write(TWO_MODELS)), devices={"cpu": fake}) as scheduler:
        assert list(scheduler.runners) == ["encoder", "ranker"]
        assert await scheduler.runners["encoder"].run("abc") == 3
        assert await scheduler.runners["ranker"].run("cab") == ["a", "b", "c"]


async def test_a_device_gets_the_lanes_of_the_file(write):
    async with Scheduler(read_config(write(TWO_MODELS)), devices={"cpu": backend()}) as scheduler:
        assert scheduler.stats().devices["cpu"].lanes == 3


async def test_a_runner_gets_the_bounds_of_the_file(write):
    fake = backend(lanes=1)
    async with Scheduler(read_config(write(TWO_MODELS)), devices={"cpu": fake}) as scheduler:
        ranker = scheduler.runners["ranker"]
        futures = [
            ranker.submit("a"),
            ranker.submit("b"),
        ]  # one runs, one is queued: that is the bound
        with pytest.raises(QueueFullError):
            ranker.submit("c")
        fake.finish_all()
        assert [await future for future in futures] == [["a"], ["b"]]


async def test_a_model_that_is_not_there_stops_the_entry_and_frees_the_others(write):
    fake = FakeBackend({"encoder": len})
    scheduler = Scheduler(read_config(write(TWO_MODELS)), devices={"cpu": fake})
    with pytest.raises(PackageNotFoundError, match="no model 'ranker'"):
        await scheduler.__aenter__()
    assert [container.closed for container in fake.containers] == [True]
    with pytest.raises(RunnerClosedError):
        await scheduler.load("encoder.pt2")


async def test_a_scheduler_is_made_from_a_file(write):
    async with Scheduler.from_config(write("[devices.cpu]\nlanes = 1\n")) as scheduler:
        assert scheduler.runners == {}


def test_a_scheduler_is_not_made_from_a_faulty_file(write):
    with pytest.raises(ConfigError, match="unknown field `model`"):
        Scheduler.from_config(write("[model.encoder]\n"))


# --- CPU devices ----------------------------------------------------------------------------------


def cpus(**cores):
    """DeviceConfigs by number: `cpus(_0=(0, 1))`."""
    return {f"cpu:{name[1:]}": DeviceConfig(affinity=affinity) for name, affinity in cores.items()}


def test_a_part_of_the_cpu_is_the_cores_that_are_named_for_it():
    devices = cpus(_0=(0, 1), _1=(3,)) | {"cpu": DeviceConfig(affinity=(0,))}
    assert cores_of("cpu:0", devices) == (0, 1)
    assert cores_of("cpu:1", devices) == (3,)
    assert cores_of("cpu", devices) is None
    assert cores_of("cuda:0", devices) is None


@pytest.mark.parametrize("devices", [{}, cpus(_0=None), cpus(_0=()), cpus(_0=None, _1=(0, 1))])
def test_a_part_of_the_cpu_for_which_no_cores_are_named_has_none_yet(devices):
    assert cores_of("cpu:0", devices) == ()


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [
        (cpus(_0=(0, 1), _7=(1, 2)), r"devices.cpu:0: affinity: core 1 also belongs to 'cpu:7'"),
        (cpus(_0=(1, 1)), r"devices.cpu:0: affinity=\[1, 1\]: a core is named twice"),
    ],
)
def test_cores_that_are_not_its_own_are_refused(devices, sentence):
    with pytest.raises(ConfigError, match=sentence):
        cores_of("cpu:0", devices)


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (2, [(4,), (5,)]),
        (3, [(4, 5), (6,)]),
        (4, [(4, 5), (6, 7)]),
        (7, [(4, 5, 6, 7), (8, 9, 10)]),
    ],
)
def test_cores_are_divided_and_what_is_left_goes_to_the_first(count, shares):
    assert divided(["cpu:10", "cpu:9"], range(4, 4 + count)) == dict(
        zip(["cpu:9", "cpu:10"], shares, strict=True)
    )


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_cores_than_devices_are_not_divided(count):
    with pytest.raises(
        ConfigError, match=f"'cpu:0', 'cpu:1': {count} cores can't be divided among 2 devices"
    ):
        divided(["cpu:0", "cpu:1"], range(count))


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("cuda", "cuda:0"),
        ("cuda:00", "cuda:0"),
        ("cpu:01", "cpu:1"),
        ("cpu", "cpu"),
        ("mps", "mps"),
        ("cpu:\u0663", "cpu:\u0663"),
    ],
)
def test_a_device_has_one_name(name, full):
    assert in_full(name) == full


@pytest.mark.parametrize("count", [0, 1025, 10**9])
async def test_instances_and_lanes_have_upper_bounds(count, write):
    for text in (
        f"[devices.cpu]\nlanes = {count}",
        f'[models.m]\npath = "m.pt2"\ninstances = {count}',
    ):
        with pytest.raises(ConfigError, match=r"(lanes|instances): Expected `int`"):
            read_config(write(text))
    with pytest.raises(ConfigError, match="lanes"):
        Scheduler(SchedulerConfig(devices={"cpu": DeviceConfig(lanes=count)}))
    async with Scheduler(devices={"cpu": FakeBackend({"m": len})}) as scheduler:
        with pytest.raises(ConfigError, match="instances"):
            await scheduler.load("m.pt2", instances=count)


@pytest.mark.parametrize("name", ["cache_age", "slow", "loop_lag"])
@pytest.mark.parametrize("value", ["50 ms", dt.timedelta(seconds=1)])
def test_a_time_in_code_is_a_number_of_seconds(name, value):
    with pytest.raises(ConfigError) as caught:
        Scheduler(SchedulerConfig(**{name: value}))
    assert str(caught.value) == (
        f"{name}: expected a number of seconds, such as 0.05, got {value!r}."
    )
