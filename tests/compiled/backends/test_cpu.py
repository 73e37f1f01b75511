"""The CPU: how many cores the process may use, and threads that are set for one thread alone."""

import json
import os
import threading
import zipfile

import pytest
import torch

from aoti_sched.backends import cpu
from aoti_sched.backends.contracts import LoadRequest
from aoti_sched.backends.cpu import CpuDevice, available_cores, set_threads
from aoti_sched.errors import (
    ModelNotFoundError,
    PackageHashError,
    PlatformMismatchError,
    RunnerClosedError,
)

# --- cores ----------------------------------------------------------------------------------------


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)


def v1(quota, period="100000"):
    return {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": f"{period}\n"}


QUOTAS = {
    "version 2, two and a half cores": ({"cpu.max": "250000 100000\n"}, 2.5),
    "version 2, half a core": ({"cpu.max": "25000 50000\n"}, 0.5),
    "version 2 without a quota": ({"cpu.max": "max 100000\n"}, None),
    "version 1, three cores": (v1(300000), 3.0),
    "version 1, another period": (v1(100000, 200000), 0.5),
    "version 1 without a quota": (v1(-1), None),
    "both, of which the newer counts": ({"cpu.max": "100000 100000\n", **v1(300000)}, 1.0),
    "the newer says there is none": ({"cpu.max": "max 100000\n", **v1(300000)}, None),
    "the newer is broken": ({"cpu.max": "?\n", **v1(300000)}, 3.0),
    "version 1 without its period": ({"cpu/cpu.cfs_quota_us": "300000\n"}, None),
    "all broken": ({"cpu.max": "", **v1("?")}, None),
    "no files": ({}, None),
}


@pytest.mark.parametrize(("files", "cores"), QUOTAS.values(), ids=QUOTAS)
def test_a_cgroups_quota_is_read(tmp_path, files, cores):
    write(tmp_path, files)
    assert cpu._cgroup_quota(tmp_path) == cores


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [(8, None, 8), (8, 3.0, 3), (8, 2.5, 3), (8, 0.5, 1), (2, 16.0, 2), (1, 0.1, 1)],
)
def test_the_smaller_of_affinity_and_quota_counts_rounded_up(monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(cpu, "_cgroup_quota", lambda root: quota)
    assert available_cores() == cores


def test_without_affinity_the_machines_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(cpu, "_cgroup_quota", lambda root: None)
    assert available_cores() == 6


def test_this_process_may_use_a_core():
    assert 1 <= CpuDevice().cores() <= (os.cpu_count() or 1)


def test_a_narrower_affinity_is_seen_at_once(in_own_process):
    result = in_own_process("""
        import os
        from aoti_sched.backends.cpu import available_cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(available_cores())
    """)
    assert result.stdout == "1\n", result.stderr


# --- threads --------------------------------------------------------------------------------------


def in_new_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def set_and_look(count):
    set_threads(count)
    return torch.get_num_threads()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_threads_count_is_what_it_was_set_to(count):
    assert in_new_thread(lambda: set_and_look(count)) == count


def test_a_threads_count_can_be_set_again():
    assert in_new_thread(lambda: [set_and_look(count) for count in (3, 1, 2)]) == [3, 1, 2]


def test_setting_one_threads_count_leaves_all_others_alone():
    here, elsewhere = torch.get_num_threads(), in_new_thread(torch.get_num_threads)
    assert in_new_thread(lambda: set_and_look(here + 3)) == here + 3
    assert torch.get_num_threads() == here
    assert in_new_thread(torch.get_num_threads) == elsewhere


def test_two_threads_keep_their_own_counts_side_by_side():
    both_set = threading.Barrier(2)
    seen = {}

    def set_wait_look(count):
        set_threads(count)
        both_set.wait(60)
        seen[count] = torch.get_num_threads()

    threads = [threading.Thread(target=set_wait_look, args=(count,)) for count in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1: 1, 2: 2}


def test_work_in_parallel_gives_the_same_after_the_count_is_set():
    x = torch.randn(300, 300, dtype=torch.float64)
    expected = x @ x
    for count in (1, 2):
        assert torch.allclose(
            in_new_thread(lambda count=count: (set_threads(count), x @ x)[1]), expected
        )


def test_without_openmp_torchs_own_function_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "_symbol", lambda name: None)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    set_threads(3)
    assert calls == [3]


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def load_model(built, tmp_path):
    """Load a compiled model as the front does; closed when the test is over."""
    loaded = []

    def load(name, **changes):
        settings = {
            "name": name,
            "path": built(name).path,
            "model_name": None,
            "instances": 1,
            "sha256": None,
        }
        device = CpuDevice()
        request = LoadRequest(**{**settings, "cache_dir": tmp_path, **changes})
        loaded.append(device.load(device.inspect(request)))
        return loaded[-1]

    yield load
    for container in loaded:
        container.close()


def test_a_loaded_model_runs(load_model, built):
    model = built("mlp")
    container = load_model("mlp")
    (output,) = container.run_raw(model.args)
    assert torch.allclose(output, model.module()(*model.args), atol=1e-5)


def test_a_loaded_model_says_what_it_is(load_model):
    info = load_model("mlp", instances=2).info
    assert (info.runtime, info.gil, info.instances) == ("c_abi", "released", 2)
    assert (info.num_inputs, info.num_outputs, info.missing) == (1, 1, ())
    assert {constant.fqn for constant in info.constants} == {
        "hidden.weight", "hidden.bias", "out.weight", "out.bias"
    }  # fmt: skip


def test_a_model_that_writes_to_its_buffers_gets_one_instance(load_model):
    assert load_model("mutating", instances=4).info.instances == 1


def test_a_models_own_threads_are_its_limit(built, tmp_path):
    request = LoadRequest(
        name="parallel",
        path=built("parallel").path,
        model_name=None,
        instances=1,
        sha256=None,
        cache_dir=tmp_path,
    )
    assert CpuDevice().inspect(request).thread_limit == 2


def test_an_unpacked_package_lies_under_the_cache(load_model, tmp_path):
    load_model("mlp")
    assert list(tmp_path.rglob("*.so"))


def test_a_wrong_hash_stops_before_anything_is_unpacked(load_model, tmp_path):
    with pytest.raises(PackageHashError):
        load_model("mlp", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_package_does_not_hold_is_not_loaded(load_model):
    with pytest.raises(ModelNotFoundError):
        load_model("mlp", model_name="other")


def test_a_model_of_another_device_is_not_loaded(load_model, built, tmp_path):
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(built("mlp").path) as package, zipfile.ZipFile(other, "w") as copy:
        for member in package.namelist():
            data = package.read(member)
            if member.endswith(".wrapper_metadata.json"):
                data = json.dumps({**json.loads(data), "AOTI_DEVICE_KEY": "mps"}).encode()
            copy.writestr(member, data)
    with pytest.raises(PlatformMismatchError, match=r"other.pt2: .*'model' was compiled for mps"):
        load_model("mlp", path=other)


def test_a_closed_container_refuses_to_run(load_model, built):
    container = load_model("mlp")
    container.close()
    container.close()
    with pytest.raises(RunnerClosedError):
        container.run_raw(built("mlp").args)


def test_outputs_that_are_the_models_own_weights_are_copies(load_model, built):
    container, module = load_model("aliasing"), built("aliasing").module()
    for output in container.run_raw([torch.zeros(4)]):
        output.add_(1)
    again = container.run_raw([torch.zeros(4)])
    for output, expected in zip(again, module(torch.zeros(4)), strict=True):
        assert torch.equal(output, expected)


def test_a_block_has_threads_of_its_own_and_puts_the_callers_back():
    def here():
        before = torch.get_num_threads()
        with cpu.with_threads(before + 1):
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())
        expected.extend([before + 1, before])

    seen, expected = [], []
    thread = threading.Thread(target=here)
    thread.start()
    thread.join()
    assert seen == expected
