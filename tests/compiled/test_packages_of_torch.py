"""What torch really writes, and that what is unpacked really loads; `build.py` compiles it once.

The packages are kept under `.cache/test-packages`, by torch's version and the text of `build.py`.
"""

import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

from aoti_sched.errors import ModelNotFoundError, PackageFormatError
from aoti_sched.package import WeightsLocation, check_platform, open_package

BUILD = Path(__file__).with_name("build.py")


@pytest.fixture(scope="session")
def packages() -> Path:
    key = hashlib.sha256(BUILD.read_bytes() + version("torch").encode()).hexdigest()[:16]
    directory = Path(__file__).parents[1] / ".cache" / "test-packages" / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            building = directory.with_suffix(".new")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            run = subprocess.run(
                [sys.executable, BUILD, building], capture_output=True, text=True, check=False
            )
            assert run.returncode == 0, run.stderr
            building.rename(directory)
    return directory


@pytest.mark.parametrize(
    ("file", "model", "weights"),
    [
        ("plain.pt2", "model", WeightsLocation.IN_LIBRARY),
        ("blob.pt2", "model", WeightsLocation.BLOB),
        ("several.pt2", "pooling", WeightsLocation.PICKLED),
        ("several.pt2", "custom", WeightsLocation.ABSENT),
        ("bare/custom.so", "custom", WeightsLocation.IN_LIBRARY),
    ],
)
def test_the_weights_are_where_they_were_compiled_to(packages, file, model, weights):
    assert open_package(packages / file).model(model).weights is weights


@pytest.mark.parametrize("file", ["plain.pt2", "blob.pt2", "bare/custom.so"])
def test_what_was_compiled_here_runs_here(packages, file):
    model = open_package(packages / file).model()
    assert (model.device, model.platform) == ("cpu", sys.platform)
    assert model.cpu_isa
    check_platform(model)


def test_metadata_given_at_compile_time_comes_along(packages):
    assert open_package(packages / "plain.pt2").model().metadata["owner"] == "the tests"


def test_only_custom_operators_need_a_proxy_executor(packages):
    several = open_package(packages / "several.pt2")
    assert not several.model("pooling").needs_proxy_executor
    assert several.model("custom").needs_proxy_executor
    assert open_package(packages / "bare" / "custom.so").model().needs_proxy_executor


def test_threads_given_at_compile_time_are_the_limit(packages):
    model = open_package(packages / "several.pt2").model("pooling")
    assert (model.thread_limit, model.fixed_threads) == (3, 3)


def test_threads_of_the_compiling_machine_are_the_limit_by_default(packages):
    model = open_package(packages / "plain.pt2").model()
    threads = int(model.metadata["threads"])
    assert model.thread_limit == (threads if threads > 1 else None)


def test_a_single_thread_at_compile_time_means_no_parallel_region(packages):
    model = open_package(packages / "several.pt2").model("custom")
    assert (model.thread_limit, model.fixed_threads) == (None, None)


def test_several_models_in_one_package_are_told_apart(packages):
    package = open_package(packages / "several.pt2")
    assert package.models == ("custom", "pooling")
    with pytest.raises(ModelNotFoundError, match="'custom', 'pooling'"):
        package.model()


def test_the_wrapper_states_the_inputs(packages):
    assert "inputs_info_[0].name" in open_package(packages / "plain.pt2").wrapper_source()


def test_an_exported_program_is_told_from_a_compiled_one(packages):
    with pytest.raises(PackageFormatError, match="only an exported program: compile it"):
        open_package(packages / "exported.pt2")


def test_an_unpacked_library_runs(packages, tmp_path):
    import torch

    from tests.compiled.build import ROWS, WIDTH, Pooling, seeded

    extracted = open_package(packages / "plain.pt2").extract(cache_dir=tmp_path)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(extracted.library), 1)
    x = torch.randn(ROWS, WIDTH)
    got = runner.run([x])
    # The sum of all rows is taken in another order.
    torch.testing.assert_close(
        tuple(got), seeded(Pooling)(x), check_stride=False, rtol=1e-5, atol=1e-5
    )


def test_an_unpacked_bare_library_finds_its_operators(packages, tmp_path):
    import torch

    from tests.compiled.build import ROWS, WIDTH, Custom, seeded

    extracted = open_package(packages / "bare" / "custom.so").extract(cache_dir=tmp_path)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(extracted.library), 1)
    x = torch.randn(ROWS, WIDTH)
    torch.testing.assert_close(runner.run([x])[0], seeded(Custom)(x))


def test_the_blob_holds_the_weights(packages, tmp_path):
    import torch

    from tests.compiled.build import Custom, seeded

    blob = open_package(packages / "blob.pt2").extract(cache_dir=tmp_path).weights_blob.read_bytes()
    weight = seeded(Custom).weight.detach()
    torch.testing.assert_close(
        torch.frombuffer(bytearray(blob), dtype=torch.float32)[: weight.numel()], weight
    )


def test_pickled_weights_are_the_modules_own(packages, tmp_path):
    import torch

    from tests.compiled.build import Pooling, seeded

    stored = open_package(packages / "several.pt2").extract("pooling", tmp_path).stored_weights
    expected = seeded(Pooling).state_dict()
    assert stored.keys() == expected.keys()
    for name, weight in stored.items():
        tensor = torch.load(weight.file, weights_only=True).as_strided(
            weight.shape, weight.stride, weight.offset
        )
        torch.testing.assert_close(tensor.detach(), expected[name])
