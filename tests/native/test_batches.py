"""Batches on native lanes: the contract in every way there is, real models, and nothing lost in ten thousand of them."""

import pytest

from aoti_sched.backends.cpu import set_threads
from aoti_sched.backends.native import executor as native
from aoti_sched.backends.native.executor import NativeExecutor
from aoti_sched.backends.threads import ThreadsExecutor
from tests.backends.batch_contract import GatheringContract, StagingContract
from tests.native.c_function import CFunction


class OnNativeLanes:
    def open(self, lanes):
        return NativeExecutor("cpu", lanes, 2, set_threads)

    def container(self, function, *, inputs=1, outputs=1, own=lambda outputs: outputs):
        return CFunction(function, inputs, outputs, own)


class TestBatchesOnNativeLanes(OnNativeLanes, StagingContract):
    pass


class TestBatchesThroughCapsules(OnNativeLanes, StagingContract):
    """As with a torch that can't wrap a tensor for C++."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch):
        monkeypatch.setattr(native, "WRAP", "a name that this torch has no function of")


class TestBatchesWithoutTheFunctionsOfTorch(OnNativeLanes, GatheringContract):
    """As with a torch that lacks one of the functions that lanes need for batches."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch):
        monkeypatch.setattr(native, "SHIM", (*native.SHIM, "a_name_that_this_torch_has_no_function_of"))


class TestBatchesOnNativeStandIns(StagingContract):
    """Containers that C can't run."""

    def open(self, lanes):
        return NativeExecutor("cpu", lanes, 2, set_threads)


class TestBatchesOnThreadsOfCModels(OnNativeLanes, StagingContract):
    """Through ctypes where the native module is not built."""

    def open(self, lanes):
        return ThreadsExecutor("cpu", lanes, set_threads)
