"""Whether a model fits this machine: `check_platform` and what it knows about the machine."""

import platform
import sys
from pathlib import Path

import pytest

from aoti_sched.errors import InstructionSetError, PlatformMismatchError
from aoti_sched.package import PackagedModel, check_platform, open_package
from aoti_sched.package.platform import parse_cpuinfo, parse_isa, this_cpu_isa
from tests.unit.package.files import metadata, write_package

AVX512_FLAGS = "fma f16c avx2 avx512f avx512dq avx512vl avx512bw"


@pytest.fixture
def model(tmp_path):
    def make(**keys: str) -> PackagedModel:
        return open_package(
            write_package(tmp_path / "p.pt2", files={"abc.wrapper_metadata.json": metadata(**keys)})
        ).model()

    return make


@pytest.fixture
def cpu(monkeypatch):
    """Be on another machine: its platform and machine names and its /proc/cpuinfo."""

    def be(text: str | None, machine: str = "x86_64", system: str = "linux") -> None:
        def read_text(path, **_):
            if text is None:
                raise PermissionError(13, "Permission denied")
            return text

        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(Path, "read_text", read_text)
        this_cpu_isa.cache_clear()

    yield be
    this_cpu_isa.cache_clear()


def test_a_model_for_this_machine_passes(model):
    check_platform(model(AOTI_PLATFORM=sys.platform, AOTI_MACHINE=platform.machine()))


def test_a_model_that_says_nothing_passes(model):
    check_platform(model())


def test_a_model_for_another_system_is_refused_with_both_named(model, cpu):
    built = model(AOTI_PLATFORM="darwin", AOTI_MACHINE="arm64")
    cpu(f"flags : {AVX512_FLAGS}")
    with pytest.raises(
        PlatformMismatchError,
        match=r"p\.pt2: model 'model' was compiled for darwin/aarch64, this is linux/x86_64",
    ):
        check_platform(built)


def test_a_model_for_another_machine_is_refused(model, cpu):
    built = model(AOTI_PLATFORM="linux", AOTI_MACHINE="aarch64")
    cpu(f"flags : {AVX512_FLAGS}")
    with pytest.raises(
        PlatformMismatchError, match=r"linux/aarch64, this is linux/x86_64\. Compile it here"
    ):
        check_platform(built)


@pytest.mark.parametrize(
    ("built", "here"),
    [("AMD64", "x86_64"), ("x86_64", "AMD64"), ("arm64", "aarch64"), ("aarch64", "arm64")],
)
def test_one_machine_under_two_names_is_one_machine(model, cpu, built, here):
    described = model(AOTI_MACHINE=built)
    cpu(None, machine=here)
    check_platform(described)


def test_a_wider_instruction_set_is_refused_with_both_sides_and_the_gap(model):
    with pytest.raises(InstructionSetError) as caught:
        check_platform(
            model(AOTI_CPU_ISA="AVX512 AVX512_VNNI AMX_TILE"), cpu_isa=frozenset({"AVX2", "AVX512"})
        )
    text = str(caught.value)
    assert "compiled for AMX_TILE AVX512 AVX512_VNNI" in text
    assert "this CPU has AVX2 AVX512: AMX_TILE AVX512_VNNI is missing" in text
    assert isinstance(caught.value, PlatformMismatchError)
    assert text.startswith(f"{caught.value.path}: model 'model' was compiled")


def test_a_cpu_without_vector_instructions_is_described_in_words(model):
    with pytest.raises(InstructionSetError, match="this CPU has none of them: AVX2 is missing"):
        check_platform(model(AOTI_CPU_ISA="AVX2"), cpu_isa=frozenset())


def test_a_narrower_instruction_set_passes(model):
    check_platform(model(AOTI_CPU_ISA="AVX2"), cpu_isa=frozenset({"AVX2", "AVX512"}))


def test_a_model_without_vector_instructions_passes_everywhere(model):
    check_platform(model(AOTI_CPU_ISA="INVALID_VEC_ISA"), cpu_isa=frozenset())


def test_an_instruction_set_of_a_later_torch_is_not_judged(model):
    check_platform(model(AOTI_CPU_ISA="AVX2 AVX99"), cpu_isa=frozenset({"AVX2"}))


def test_where_the_cpu_cannot_be_read_nothing_is_judged(model, cpu):
    built = model(AOTI_CPU_ISA="AVX512")
    cpu(None)
    assert this_cpu_isa() is None
    check_platform(built)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("sse2", set()),
        ("avx2", set()),  # torch compiles AVX2 with -mfma -mf16c
        ("avx2 fma f16c", {"AVX2"}),
        (AVX512_FLAGS, {"AVX2", "AVX512"}),
        (f"{AVX512_FLAGS} avx512_vnni", {"AVX2", "AVX512", "AVX512_VNNI"}),
        (f"{AVX512_FLAGS} amx_tile amx_bf16 amx_int8", {"AVX2", "AVX512", "AMX_TILE"}),
    ],
)
def test_flags_are_known_by_the_names_of_torch(cpu, flags, names):
    cpu(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    assert this_cpu_isa() == names


def test_on_arm_the_features_are_read_and_the_baseline_is_known(cpu):
    cpu("Features\t: fp asimd sve sve2 bf16\n", machine="aarch64")
    assert {"ASIMD", "NEON", "SVE", "SVE256", "SVE2"} <= this_cpu_isa()


def test_on_power_the_baseline_is_known_though_no_flag_says_so(cpu):
    cpu("cpu : POWER9, altivec supported\n", machine="ppc64le")
    assert this_cpu_isa() == {"VSX"}


def test_on_s390x_the_vector_facility_is_recognized(cpu):
    cpu("features\t: esan3 zarch vx vxd vxe gs\n", machine="s390x")
    assert this_cpu_isa() == {"ZVECTOR"}


def test_beside_linux_only_the_architecture_itself_is_known(cpu):
    cpu(f"flags : {AVX512_FLAGS}", system="darwin")
    assert this_cpu_isa() is None
    cpu(None, machine="arm64", system="darwin")
    assert this_cpu_isa() == {"ASIMD", "NEON"}


def test_on_unequal_cores_what_all_of_them_have_counts():
    assert parse_cpuinfo("flags : a b c\n\nflags : b c d\n") == {"b", "c"}


def test_a_listing_without_flags_says_nothing():
    assert parse_cpuinfo("cpu : POWER9\n") is None


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("AVX2", "_is_avx2_supported"),
        ("AVX512", "_is_avx512_supported"),
        ("AVX512_VNNI", "_is_vnni_supported"),
        ("AMX_TILE", "_is_amx_tile_supported"),
    ],
)
def test_torch_sees_the_same_instruction_sets_on_this_machine(name, question):
    torch = pytest.importorskip("torch")
    assert (name in this_cpu_isa()) == getattr(torch.cpu, question)()


def test_no_vector_instructions_means_an_empty_set():
    assert parse_isa("INVALID_VEC_ISA") == parse_isa("") == frozenset()
