"""The runtime's traps on a CPU: first that they are there, in a process that may die of them,
then that ours are not.

What a trap does is as of torch 2.13. Where the stock way ends the process, ours runs in a process
of its own too, and prints `served on` when it is still there.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import weakref
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from torch.testing import assert_close

from aoti_sched import (
    InputMismatchError,
    InstructionSetError,
    PackageFormatError,
    PackageHashError,
    PlatformMismatchError,
    RunError,
    Scheduler,
    SchedulerConfig,
)
from aoti_sched.package.platform import KNOWN_ISA, spelled_machine, this_cpu_isa
from tests.models import build

PRELUDE = """
import asyncio, ctypes, os, sys, torch, aoti_sched
from pathlib import Path
from tests.models import build
from torch._C._aoti import AOTIModelContainerRunnerCpu

async def serve_on(scheduler):
    built = build("mlp")
    runner = await scheduler.load(built.path, name="another")
    torch.testing.assert_close(await runner.run(*built.args), built.module()(*built.args))
    print("served on")
"""


@pytest.fixture
def program(python):
    def run(text, *arguments, **environment):
        return python(PRELUDE + textwrap.dedent(text), *arguments, **environment)

    return run


def served_on(process: subprocess.CompletedProcess[str]) -> bool:
    assert process.returncode == 0, process.stderr[-4000:]
    return "served on" in process.stdout


def patched(package: Path, target: Path, **metadata: str) -> Path:
    """A copy of a package with other metadata."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("wrapper_metadata.json"):
                data = json.dumps({**json.loads(data), **metadata}).encode()
            new.writestr(member.filename, data)
    return target


# --- weights that are not there -------------------------------------------------------------------


def test_the_stock_runner_dies_when_a_package_has_no_weights(program):
    process = program(
        "AOTIModelContainerRunnerCpu(str(build('weights_none').library()), 1).run([torch.randn(3, "
        "4)])"
    )
    assert process.returncode == -signal.SIGSEGV


def test_a_package_without_weights_is_refused_at_load_and_the_process_serves_on(program):
    assert served_on(
        program("""
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                try:
                    await scheduler.load(build("weights_none").path)
                except aoti_sched.MissingWeightsError as error:
                    assert "0.weight, 0.bias, 1.weight" in str(error), error
                    await serve_on(scheduler)

        asyncio.run(main())
        """)
    )


# --- inputs that don't fit ------------------------------------------------------------------------


def test_a_wrong_number_of_inputs_through_the_c_abi_ends_the_process(program):
    process = program("""
        from aoti_sched.backends.aoti.c_abi import Library
        from aoti_sched.backends.aoti.handles import handles_of
        library = Library(build("mlp").library())
        container = ctypes.c_void_p()
        create = "AOTInductorModelContainerCreateWithDevice"
        library.call(create, ctypes.byref(container), 1, b"cpu", None)
        inputs = (ctypes.c_void_p * 2)(*handles_of([torch.randn(2, 8), torch.randn(2, 8)]))
        outputs = (ctypes.c_void_p * 1)()
        run = library.function("AOTInductorModelContainerRun")
        run(container, inputs, 2, outputs, 1, None, None)
        """)
    assert process.returncode == -signal.SIGABRT


def test_a_wrong_number_of_inputs_is_refused_even_where_nothing_else_is_known(program, tmp_path):
    assert served_on(
        program(
            """
            library = Path(sys.argv[1]) / "mlp.so"
            library.write_bytes(build("mlp").library().read_bytes())

            async def main():
                async with aoti_sched.Scheduler() as scheduler:
                    runner = await scheduler.load(library)
                    for wrong in ([], [torch.randn(2, 8)] * 2):
                        try:
                            await runner.run(*wrong)
                        except aoti_sched.InputMismatchError:
                            await scheduler.runners["mlp"].run(torch.randn(2, 8))
                        else:
                            sys.exit("it was accepted")
                    await serve_on(scheduler)

            asyncio.run(main())
            """,
            tmp_path,
        )
    )


def test_the_stock_runner_takes_what_the_model_was_not_compiled_for(program):
    process = program("""
        built = build("unbounded")
        runner, module = AOTIModelContainerRunnerCpu(str(built.library()), 1), built.module()
        x = torch.randn(4, 3, dtype=torch.float64)
        print(torch.allclose(runner.run([x])[0], module(x.float())))
        runner = AOTIModelContainerRunnerCpu(str(build("mlp").library()), 1)
        print(len(runner.run([torch.randn(65, 8)])[0]))
        """)
    assert process.stdout.split() == ["False", "65"]


async def test_what_the_model_was_not_compiled_for_is_refused(scheduler):
    foreign = await scheduler.load(build("unbounded").path, name="foreign")
    with pytest.raises(InputMismatchError, match="dtype float32, got float64"):
        await foreign.run(torch.randn(4, 3, dtype=torch.float64))
    ours = await scheduler.load(build("mlp").path, name="ours")
    with pytest.raises(InputMismatchError, match="size 1 to 64 at dimension 0"):
        await ours.run(torch.randn(65, 8))


# --- packages for elsewhere, and damaged ones -----------------------------------------------------


async def test_a_wider_instruction_set_is_refused_before_it_is_sigill(scheduler, tmp_path):
    (wider, *_) = sorted(KNOWN_ISA - this_cpu_isa())
    package = patched(build("mlp").path, tmp_path / "wider.pt2", AOTI_CPU_ISA=f"AVX2 {wider}")
    with pytest.raises(InstructionSetError, match=rf"wider\.pt2: .*{wider} is missing"):
        await scheduler.load(package)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"AOTI_PLATFORM": "darwin"}, "compiled for darwin/"),
        ({"AOTI_MACHINE": "riscv64"}, "compiled for linux/riscv64"),
        ({"AOTI_DEVICE_KEY": "cuda"}, "compiled for cuda, not for cpu"),
    ],
)
async def test_a_package_for_another_platform_is_refused(scheduler, tmp_path, metadata, words):
    package = patched(build("mlp").path, tmp_path / "elsewhere.pt2", **metadata)
    with pytest.raises(PlatformMismatchError, match=words):
        await scheduler.load(package)


async def test_a_package_with_another_hash_is_refused_before_anything_of_it_is_mapped(tmp_path):
    built = build("mlp")
    package = patched(built.path, tmp_path / "tampered.pt2", note="not what was reviewed")
    expected = hashlib.sha256(built.path.read_bytes()).hexdigest()
    cache = tmp_path / "cache"
    async with Scheduler(SchedulerConfig(cache_dir=str(cache))) as scheduler:
        with pytest.raises(PackageHashError, match=expected):
            await scheduler.load(package, sha256=expected)
        assert not cache.exists()
        runner = await scheduler.load(built.path, sha256=expected)
        assert runner.info.sha256 == expected
        assert_close(await runner.run(*built.args), built.module()(*built.args))


@pytest.mark.parametrize("kept", [0, 3, 1000, 0.5, 0.99])
async def test_a_truncated_package_is_refused_by_its_file(scheduler, tmp_path, kept):
    data = build("mlp").path.read_bytes()
    package = tmp_path / "cut.pt2"
    package.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(PackageFormatError, match=r"cut\.pt2"):
        await scheduler.load(package)
    assert not scheduler.runners


def test_a_library_that_is_overwritten_while_it_is_mapped_ends_the_process(program, tmp_path):
    process = program(
        """
        library = Path(sys.argv[1]) / "mlp.so"
        library.write_bytes(build("mlp").library().read_bytes())
        runner = AOTIModelContainerRunnerCpu(str(library), 1)
        os.truncate(library, 0)
        runner.run([torch.randn(2, 8)])
        """,
        tmp_path,
    )
    assert process.returncode == -signal.SIGBUS


@pytest.mark.parametrize("suffix", ["so", "pt2"])
def test_a_model_whose_file_is_overwritten_runs_on(program, tmp_path, suffix):
    assert served_on(
        program(
            """
            built, copy = build("mlp"), Path(sys.argv[1])
            original = built.path if copy.suffix == ".pt2" else built.library()
            copy.write_bytes(original.read_bytes())

            async def main():
                async with aoti_sched.Scheduler() as scheduler:
                    runner = await scheduler.load(copy)
                    os.truncate(copy, 0)
                    got = await runner.run(*built.args)
                    torch.testing.assert_close(got, built.module()(*built.args))
                    await serve_on(scheduler)

            asyncio.run(main())
            """,
            tmp_path / f"mlp.{suffix}",
        )
    )


# --- runs that fail -------------------------------------------------------------------------------


async def test_a_failed_run_tells_torchs_root_cause_and_the_next_is_right(scheduler):
    built = build("failing")
    runner = await scheduler.load(built.path, name="lookup")
    with pytest.raises(
        RunError, match=r"^model 'lookup': the run failed: index out of bounds: 0 <= \w+ < 10L$"
    ):
        await runner.run(torch.tensor([1, 10]))
    ids = torch.tensor([9, 0, 3])
    assert_close(await runner.run(ids), built.module()(ids))
    assert (runner.stats().failed, runner.stats().completed) == (1, 1)


async def test_failed_runs_among_good_ones_touch_nobody_else(scheduler):
    built = build("failing")
    runner = await scheduler.load(built.path, instances=2)
    module = built.module()
    inputs = [torch.tensor([n % 13, 3]) for n in range(200)]
    results = await asyncio.gather(*(runner.run(ids) for ids in inputs), return_exceptions=True)
    for ids, result in zip(inputs, results, strict=True):
        if ids[0] < 10:
            assert_close(result, module(ids))
        else:
            assert isinstance(result, RunError)


async def test_ten_thousand_failed_runs_leak_neither_handle_nor_memory(scheduler, capfd):
    built = build("failing")
    runner = await scheduler.load(built.path, instances=2)
    inputs = []

    async def fail(times):
        for _ in range(times):
            ids = torch.full((64,), 10)
            inputs.append(weakref.ref(ids))  # alive as long as a handle of the tensor is
            future = runner.submit(ids)
            del ids
            with pytest.raises(RunError):
                await future
        capfd.readouterr()  # torch prints a backtrace for each

    await fail(1_000)
    gc.collect()
    memory = psutil.Process().memory_info().rss
    await fail(10_000)
    await asyncio.sleep(
        0
    )  # the loop lets go of the step it has just made, and of the last error in it
    gc.collect()
    assert not any(reference() is not None for reference in inputs)
    assert psutil.Process().memory_info().rss - memory < 4 << 20
    assert runner.stats().free_slots == 2
    assert_close(await runner.run(*built.args), built.module()(*built.args))


async def test_first_runs_may_come_all_at_once_without_a_warm_up(scheduler):
    built = build("folding")
    runner = await scheduler.load(built.path, instances=2, warmup=False)
    results = await asyncio.gather(*(runner.run(*built.args) for _ in range(8)))
    assert_close(results, [built.module()(*built.args)] * 8)


# --- custom operators -----------------------------------------------------------------------------

OPERATOR = """
@torch.library.custom_op("aoti_sched_tests::twice_plus_one", mutates_args=())
def twice_plus_one(x: torch.Tensor) -> torch.Tensor:
    if x[0] < 0:
        raise ValueError("the operator's own words")
    return x * 2 + 1
"""


def test_a_package_whose_custom_operator_is_not_registered_is_refused_with_what_to_do(python):
    process = python(
        """
        import asyncio, sys, aoti_sched

        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                try:
                    await scheduler.load(sys.argv[1])
                except aoti_sched.LoadError as error:
                    print(error)

        asyncio.run(main())
        """,
        build("custom_op").path,
    )
    assert (
        "A custom operator must be registered (imported) before its model is loaded"
        in process.stdout
    ), process


def test_a_custom_operator_that_raises_fails_its_own_run_only(python):
    process = python(
        "import asyncio, sys, torch, aoti_sched\n"
        + OPERATOR
        + textwrap.dedent("""
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                runner = await scheduler.load(sys.argv[1])
                x = torch.tensor([1.0, 2.0, 3.0, 4.0])
                before = await runner.run(x)
                try:
                    await runner.run(-x)
                except aoti_sched.RunError as error:
                    print(error)
                assert torch.equal(before, await runner.run(x))
                print("served on")

        asyncio.run(main())
        """),
        build("custom_op").path,
    )
    assert process.returncode == 0, process.stderr
    assert "the operator's own words" in process.stdout
    assert "served on" in process.stdout


async def test_a_custom_operators_model_is_not_called_with_the_wrong_number_of_inputs(scheduler):
    runner = await scheduler.load(build("custom_op").path)
    with pytest.raises(InputMismatchError):
        await runner.run()


# --- where what a model computes ends the process -------------------------------------------------


@pytest.mark.skipif(
    spelled_machine() != "x86_64", reason="other processors give 0 for a division by zero"
)
def test_an_integer_that_is_divided_by_zero_and_rounded_towards_zero_ends_the_process(program):
    process = program("""
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                runner = await scheduler.load(build("divides").path)
                x, y = build("divides").args
                assert (await runner.run(x, y)).tolist() == [0] * 16
                print("divided", flush=True)
                await runner.run(x, torch.full_like(y, -1))
                print("lives")

        asyncio.run(main())
        """)
    assert process.stdout == "divided\n"
    assert process.returncode == -signal.SIGFPE


def test_an_integer_that_is_divided_by_zero_and_rounded_down_fails_its_own_request(program):
    assert served_on(
        program("""
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                runner = await scheduler.load(build("floors").path, threads=2)
                x, y = build("floors").args
                await runner.run(x, y)
                try:
                    await runner.run(x, torch.full_like(y, -1))
                except aoti_sched.RunError as error:
                    assert "ZeroDivisionError" in str(error), error
                    await serve_on(scheduler)

        asyncio.run(main())
        """)
    )


def test_a_bad_index_ends_the_process_on_several_threads(program):
    process = program("""
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                runner = await scheduler.load(build("parallel").path, threads=2)
                x, ids = build("parallel").args
                await runner.run(x, ids)
                print("indexed", flush=True)
                await runner.run(x, torch.full_like(ids, 99))
                print("lives")

        asyncio.run(main())
        """)
    assert process.stdout == "indexed\n"
    assert process.returncode == -signal.SIGABRT


def test_a_bad_index_on_one_thread_fails_its_own_request(program):
    assert served_on(
        program("""
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                runner = await scheduler.load(build("failing").path)
                try:
                    await runner.run(torch.tensor([99]))
                except aoti_sched.RunError as error:
                    assert "index out of bounds" in str(error), error
                    await serve_on(scheduler)

        asyncio.run(main())
        """)
    )


# --- a cache to which others can change the way ---------------------------------------------------


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="libraries are mapped by descriptor on Linux"
)
@pytest.mark.parametrize("name", ["mlp", "custom_op", "weights_blob", "weights_pickle"])
async def test_a_model_is_mapped_through_a_descriptor_where_the_caches_folder_could_be_replaced(
    tmp_path, name
):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    built = build(name)
    cache = tmp_path / "shared" / "cache"
    async with Scheduler(SchedulerConfig(cache_dir=str(cache))) as scheduler:
        runner = await scheduler.load(built.path, instances=2)
        assert_close(await runner.run(*built.args), built.module()(*built.args))
    assert any(Path(file.path).is_relative_to(cache) for file in psutil.Process().memory_maps())


# --- loading, again and again ---------------------------------------------------------------------


async def test_one_package_loads_many_times_at_once(scheduler):
    built = build("weights_blob")
    runners = await asyncio.gather(
        *(scheduler.load(built.path, name=f"copy {n}") for n in range(6))
    )
    results = await asyncio.gather(*(runner.run(*built.args) for runner in runners))
    assert_close(results, [built.module()(*built.args)] * 6)


async def test_one_package_loads_again_after_it_was_closed(scheduler):
    built = build("weights_pickle")
    for _ in range(5):
        runner = await scheduler.load(built.path)
        assert_close(await runner.run(*built.args), built.module()(*built.args))
        await runner.aclose()


def test_two_processes_load_one_package_at_once_and_unpack_it_once(tmp_path):
    text = PRELUDE + textwrap.dedent("""
        async def main():
            built = build("conv")
            config = aoti_sched.SchedulerConfig(cache_dir=sys.argv[1])
            async with aoti_sched.Scheduler(config) as scheduler:
                print("ready", flush=True)
                sys.stdin.readline()
                runner = await scheduler.load(built.path)
                got = await runner.run(*built.args)
                torch.testing.assert_close(got, built.module()(*built.args))

        asyncio.run(main())
        """)
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, tmp_path / "cache"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    libraries = list((tmp_path / "cache").rglob("*.so"))
    assert len(libraries) == 1


def test_the_stock_loader_leaves_a_directory_behind_in_a_crash(program, tmp_path):
    program(
        """
        path = str(build("mlp").path)
        loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
        os._exit(0)
        """,
        TMPDIR=str(tmp_path),
    )
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["close", "crash"])
def test_ours_leaves_nothing_in_the_temporary_directory(program, tmp_path, way):
    process = program(
        """
        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                built = build("weights_blob")
                runner = await scheduler.load(built.path)
                await runner.run(*built.args)
                await serve_on(scheduler)
                if sys.argv[1] == "crash":
                    sys.stdout.flush()
                    os._exit(0)

        asyncio.run(main())
        """,
        way,
        TMPDIR=str(tmp_path),
    )
    assert served_on(process)
    assert list(tmp_path.iterdir()) == []


# --- threads --------------------------------------------------------------------------------------


async def test_more_threads_than_the_kernels_were_compiled_for_are_lowered_and_said(scheduler):
    built = build("parallel")
    runner = await scheduler.load(built.path, threads=16)
    assert runner.info.threads == 2
    assert any("lowered to 2" in note for note in runner.info.notes)
    assert_close(await runner.run(*built.args), built.module()(*built.args))


def test_the_applications_own_thread_count_stays_as_it_was(program):
    assert served_on(
        program("""
        async def main():
            torch.set_num_threads(2)
            async with aoti_sched.Scheduler() as scheduler:
                built = build("attention")
                runner = await scheduler.load(built.path, threads=1)
                await runner.run(*built.args)
                assert torch.get_num_threads() == 2
                import threading
                counts = []
                thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
                thread.start()
                thread.join()
                assert counts == [2], counts
                await serve_on(scheduler)

        asyncio.run(main())
        """)
    )


async def test_more_requests_than_instances_never_keep_another_models_lane(scheduler):
    heavy = await scheduler.load(build("heavy").path, name="heavy")
    built = build("mlp")
    light = await scheduler.load(built.path, name="light")
    futures = [heavy.submit(*build("heavy").args) for _ in range(6)]
    assert_close(await light.run(*built.args), built.module()(*built.args))
    assert not futures[-1].done()
    await asyncio.gather(*futures)


def test_the_first_load_imports_torch_off_the_loops_thread():
    text = textwrap.dedent("""
        import asyncio, sys, threading, aoti_sched

        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print("imported by", threading.current_thread() is threading.main_thread())

        sys.meta_path.insert(0, Watch())

        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                await scheduler.load(sys.argv[1])

        asyncio.run(main())
    """)
    process = subprocess.run(
        [sys.executable, "-c", text, build("mlp").path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["imported by False"]
