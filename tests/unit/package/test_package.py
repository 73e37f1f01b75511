"""What a package says about its models, on packages made by hand; `test_package_torch` has
torch's own.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aoti_sched.errors import (
    ModelNotFoundError,
    PackageFormatError,
    PackageHashError,
    PackageNotFoundError,
)
from aoti_sched.package import StoredWeight, WeightsLocation, open_package
from tests.unit.package.files import (
    Member,
    elf,
    metadata,
    model_members,
    wrapper,
    write_package,
    zipped,
)

PARALLEL = 'extern "C" void kernel()\n{\n    #pragma omp parallel num_threads(4)\n}\n'


def package_of(tmp_path: Path, *members: Member) -> Path:
    path = tmp_path / "p.pt2"
    path.write_bytes(zipped(members))
    return path


def described(tmp_path: Path, *more: Member, **files: str | bytes | None):
    """The one model of a package; `files` by the endings of their names, None removes one."""
    endings = {
        "wrapper": "abc.wrapper.cpp",
        "kernel": "def.kernel.cpp",
        "metadata": "abc.wrapper_metadata.json",
        "nodes": "abc.wrapper.json",
        "objects": "custom_objs_config.json",
        "blob": "abc.wrapper_weights.blob",
        "weights": "weights_config.json",
    }
    members = model_members(
        files={endings[key]: text for key, text in files.items() if text is not None}
    )
    removed = {endings[key] for key, text in files.items() if text is None}
    kept = [member for member in members if str(member.name).rpartition("/")[2] not in removed]
    return open_package(package_of(tmp_path, *kept, *more)).model()


# --- reading --------------------------------------------------------------------------------------


def test_reading_a_package_neither_imports_torch_nor_leaves_anything(tmp_path):
    path = write_package(tmp_path / "p.pt2")
    script = f"""
        import sys
        from aoti_sched.package import check_platform, open_package
        check_platform(open_package({str(path)!r}).model())
        print(sorted({{"torch", "ctypes", "numpy"}} & set(sys.modules)))
    """
    environment = {**os.environ, "AOTI_SCHED_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == [path]


def test_every_key_of_the_metadata_is_there_and_the_known_ones_have_names(tmp_path):
    model = described(
        tmp_path,
        metadata=metadata(
            AOTI_PLATFORM="linux",
            AOTI_MACHINE="AMD64",
            AOTI_CPU_ISA="AVX512 AVX512_VNNI",
            owner="search team",
        ),
    )
    assert model.metadata["owner"] == "search team"
    assert (model.device, model.platform, model.machine) == ("cpu", "linux", "x86_64")
    assert model.cpu_isa == {"AVX512", "AVX512_VNNI"}


def test_a_package_without_metadata_says_nothing_about_itself(tmp_path):
    model = described(tmp_path, metadata=None)
    assert (model.metadata, model.device, model.platform, model.machine, model.cpu_isa) == (
        {},
        "",
        "",
        "",
        set(),
    )


@pytest.mark.parametrize(
    "broken", ["{", '{"a": 1}', "[]", '{"a": "\\ud800"}', b'{"a": "\xff"}', '{"a": ' * 5000, ""]
)
def test_metadata_that_is_not_what_torch_writes_names_the_member(tmp_path, broken):
    with pytest.raises(PackageFormatError, match=r"abc\.wrapper_metadata\.json' is not the JSON"):
        described(tmp_path, metadata=broken)


def test_a_kernel_library_is_not_mistaken_for_the_model(tmp_path):
    kernels = model_members(
        files={"kernel_launcher.so": elf(b"launcher"), "kernel.so": elf(b"kernel")}
    )
    model = open_package(package_of(tmp_path, *kernels)).model()
    assert model.library == "p/data/aotinductor/model/abc.wrapper.so"


def test_a_library_with_a_name_of_its_own_finds_its_wrapper(tmp_path):
    files = {
        "named.so": elf(),
        "abc.wrapper.cpp": wrapper(7, "false").encode(),
        "abc.wrapper.json": b'{"nodes": [{}]}',
        "abc.wrapper_metadata.json": metadata(owner="us").encode(),
    }
    members = [
        Member(f"p/data/aotinductor/model/{name}", content) for name, content in files.items()
    ]
    package = open_package(package_of(tmp_path, *members))
    model = package.model()
    assert (model.metadata["owner"], model.weights) == ("us", WeightsLocation.ABSENT)
    # torch's runners look for the extern nodes under the library's own name.
    library = package.extract(cache_dir=tmp_path / "cache").library
    assert library.name == "named.so"
    assert library.with_suffix(".json").read_bytes() == b'{"nodes": [{}]}'


def test_the_wrapper_source_is_there_for_whoever_reads_the_inputs_in_it(tmp_path):
    package = open_package(write_package(tmp_path / "p.pt2"))
    assert package.wrapper_source() == wrapper()


def test_without_a_wrapper_there_is_no_source(tmp_path):
    members = [
        member for member in model_members() if not str(member.name).endswith(".wrapper.cpp")
    ]
    assert open_package(package_of(tmp_path, *members)).wrapper_source() is None


def test_a_missing_package_is_a_missing_file(tmp_path):
    with pytest.raises(PackageNotFoundError):
        open_package(tmp_path / "absent.pt2")


# --- which model ----------------------------------------------------------------------------------


def several(tmp_path: Path, *names: str) -> Path:
    members = [
        member
        for name in names
        for member in model_members(name, files={"abc.wrapper.so": elf(name.encode())})
    ]
    return package_of(tmp_path, *members)


def test_each_model_of_several_has_its_own_files(tmp_path):
    package = open_package(several(tmp_path, "encoder", "ranker"))
    assert package.models == ("encoder", "ranker")
    for name in package.models:
        extracted = package.extract(name, tmp_path / "cache")
        assert extracted.library.read_bytes() == elf(name.encode())
        assert package.model(name).library == f"p/data/aotinductor/{name}/abc.wrapper.so"


def test_a_name_that_begins_like_another_is_another(tmp_path):
    package = open_package(several(tmp_path, "a", "ab"))
    assert package.extract("a", tmp_path / "cache").library.read_bytes() == elf(b"a")


def test_the_only_model_needs_no_name(tmp_path):
    assert open_package(several(tmp_path, "encoder")).model().name == "encoder"


def test_of_several_the_one_that_torch_would_take_needs_no_name(tmp_path):
    assert open_package(several(tmp_path, "draft", "model")).model().name == "model"


def test_of_several_one_must_be_named_and_the_names_are_told(tmp_path):
    with pytest.raises(ModelNotFoundError, match="holds several models: 'encoder', 'ranker'"):
        open_package(several(tmp_path, "encoder", "ranker")).model()


def test_an_unknown_model_is_named_beside_the_known_ones(tmp_path):
    with pytest.raises(ModelNotFoundError, match="holds no model 'ranker'; it holds 'encoder'"):
        open_package(several(tmp_path, "encoder")).extract("ranker", tmp_path / "cache")


def test_a_model_may_be_given_instead_of_its_name(tmp_path):
    package = open_package(several(tmp_path, "encoder", "ranker"))
    model = package.model("ranker")
    assert package.extract(model, tmp_path / "cache").library.read_bytes() == elf(b"ranker")
    assert package.wrapper_source(model) == wrapper()


@pytest.mark.parametrize("name", ["model v2 (Ünïcode)", "x" * 200, "-rf", "a.lock"])
def test_a_model_of_any_name_has_a_place_in_the_cache(tmp_path, name):
    package = open_package(several(tmp_path, name, "model"))
    assert package.extract(name, tmp_path / "cache").library.read_bytes() == elf(name.encode())


@pytest.mark.parametrize("root", ["", "p/", "some/where/"])
def test_the_top_folder_may_be_any_or_none(tmp_path, root):
    assert open_package(package_of(tmp_path, *model_members(root=root))).models == ("model",)


def test_two_top_folders_are_refused(tmp_path):
    with pytest.raises(PackageFormatError, match="several top folders: 'p/', 'q/'"):
        open_package(package_of(tmp_path, *model_members(), *model_members("other", root="q/")))


def test_an_exported_program_is_called_one(tmp_path):
    with pytest.raises(PackageFormatError, match="only an exported program: compile it"):
        open_package(package_of(tmp_path, Member("p/models/model.json", b"{}")))


def test_any_other_zip_holds_no_model(tmp_path):
    with pytest.raises(PackageFormatError, match="holds no compiled model"):
        open_package(package_of(tmp_path, Member("notes.txt", b"hello")))


def test_a_model_packaged_as_sources_only_is_explained(tmp_path):
    members = [member for member in model_members() if not str(member.name).endswith(".so")]
    with pytest.raises(
        PackageFormatError, match=r"model 'model' has no shared library.*package_cpp_only"
    ):
        open_package(package_of(tmp_path, *members))


def test_a_model_with_two_libraries_alike_is_refused(tmp_path):
    second = Member("p/data/aotinductor/model/xyz.wrapper.so", elf())
    with pytest.raises(
        PackageFormatError, match=r"several libraries: 'abc\.wrapper\.so', 'xyz\.wrapper\.so'"
    ):
        open_package(package_of(tmp_path, *model_members(), second))


# --- weights --------------------------------------------------------------------------------------

STORED = json.dumps(
    {"linear.weight": ["weight_0", [2, 3], [3, 1], 0], "tied": ["weight_0", [3, 2], [1, 3], 0]}
)
WEIGHT = Member("p/data/weights/weight_0", b"pickled")


def test_weights_are_in_the_library_when_the_wrapper_says_so(tmp_path):
    assert described(tmp_path).weights is WeightsLocation.IN_LIBRARY


def test_weights_are_in_a_blob_when_one_is_there(tmp_path):
    assert (
        described(tmp_path, wrapper=wrapper(3, "false"), blob=b"1234").weights
        is WeightsLocation.BLOB
    )


def test_weights_are_pickled_when_the_library_has_none_and_a_list_names_them(tmp_path):
    model = described(tmp_path, WEIGHT, wrapper=wrapper(3, "false"), weights=STORED)
    assert model.weights is WeightsLocation.PICKLED


def test_weights_in_the_library_need_no_pickled_ones(tmp_path):
    assert described(tmp_path, WEIGHT, weights=STORED).weights is WeightsLocation.IN_LIBRARY


def test_weights_are_absent_when_nothing_brings_them(tmp_path):
    # torch writes an empty list for a model whose neighbour in the package has pickled weights
    model = described(tmp_path, WEIGHT, wrapper=wrapper(3, "false"), weights="{}")
    assert model.weights is WeightsLocation.ABSENT


def test_a_model_without_constants_misses_none(tmp_path):
    assert described(tmp_path, wrapper=wrapper(0, "false")).weights is WeightsLocation.NO_CONSTANTS


def test_without_the_wrapper_nobody_knows_where_the_weights_are(tmp_path):
    assert described(tmp_path, wrapper=None).weights is WeightsLocation.UNKNOWN


def test_pickled_weights_are_extracted_and_found_by_name(tmp_path):
    other = Member("p/data/weights/weight_1", b"of another model")
    members = model_members(files={"weights_config.json": STORED})
    extracted = open_package(package_of(tmp_path, *members, WEIGHT, other)).extract(
        cache_dir=tmp_path / "cache"
    )
    weight = extracted.stored_weights["linear.weight"]
    assert weight == StoredWeight(weight.file, shape=(2, 3), stride=(3, 1), offset=0)
    assert extracted.stored_weights["tied"] == StoredWeight(
        weight.file, shape=(3, 2), stride=(1, 3), offset=0
    )
    assert weight.file.read_bytes() == b"pickled"
    assert [path.name for path in weight.file.parent.iterdir()] == ["weight_0"]


def test_a_weights_blob_is_extracted(tmp_path):
    path = write_package(tmp_path / "p.pt2", files={"abc.wrapper_weights.blob": b"1234"})
    extracted = open_package(path).extract(cache_dir=tmp_path / "cache")
    assert extracted.weights_blob.read_bytes() == b"1234"
    assert extracted.stored_weights == {}


@pytest.mark.parametrize("file", ["weight_7", "../weight_0", "/etc/passwd"])
def test_a_weight_in_a_file_that_is_not_there_is_named(tmp_path, file):
    with pytest.raises(
        PackageFormatError, match=rf"constant 'w' into '{file}', which is not there"
    ):
        described(
            tmp_path, wrapper=wrapper(1, "false"), weights=json.dumps({"w": [file, [1], [1], 0]})
        )


# --- what it needs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        ({}, False),
        ({"nodes": '{"nodes": []}'}, False),
        ({"nodes": '{"nodes": [{"name": "buf1", "node": {}}]}'}, True),
        ({"objects": "{}"}, False),
        ({"objects": '{"obj": "custom_obj_0"}'}, True),
    ],
)
def test_a_proxy_executor_is_needed_only_for_nodes_or_objects_that_are_listed(
    tmp_path, files, needed
):
    assert described(tmp_path, **files).needs_proxy_executor is needed


def test_custom_objects_are_extracted_beside_the_library(tmp_path):
    constants = [
        Member("p/data/constants/custom_obj_0", b"object"),
        Member("p/data/constants/tensor_0", b"tensor"),
    ]
    members = model_members(files={"custom_objs_config.json": '{"obj": "custom_obj_0"}'})
    extracted = open_package(package_of(tmp_path, *members, *constants)).extract(
        cache_dir=tmp_path / "cache"
    )
    assert (extracted.library.parent / "custom_obj_0").read_bytes() == b"object"
    assert not (extracted.directory / "tensor_0").exists()


def test_gpu_kernels_in_folders_of_their_own_keep_their_places(tmp_path):
    path = write_package(tmp_path / "p.pt2", files={"kernels/k.cubin": b"cubin"})
    directory = open_package(path).extract(cache_dir=tmp_path / "cache").directory
    assert (directory / "kernels" / "k.cubin").read_bytes() == b"cubin"


def test_the_thread_limit_is_read_from_the_kernels(tmp_path):
    model = described(tmp_path, kernel=PARALLEL)
    assert (model.thread_limit, model.fixed_threads) == (4, 4)


def test_kernels_without_parallel_regions_set_no_limit(tmp_path):
    model = described(tmp_path)
    assert (model.thread_limit, model.fixed_threads) == (None, None)


def test_without_sources_one_thread_is_what_every_kernel_bears(tmp_path):
    model = described(tmp_path, wrapper=None, kernel=None)
    assert (model.sources, model.thread_limit) == ((), 1)


# --- bare libraries -------------------------------------------------------------------------------


def bare(tmp_path: Path, **files: str | bytes) -> Path:
    library = tmp_path / "lib" / "encoder.so"
    library.parent.mkdir()
    for name, content in {
        "encoder.so": elf(),
        **{k.replace("__", "."): v for k, v in files.items()},
    }.items():
        (library.parent / name).write_bytes(
            content.encode() if isinstance(content, str) else content
        )
    return library


def test_a_bare_library_alone_says_only_its_machine(tmp_path):
    model = open_package(bare(tmp_path)).model()
    assert (model.name, model.library, model.machine) == ("encoder", "encoder.so", "x86_64")
    assert (model.device, model.platform, model.metadata) == ("", "", {})
    assert model.weights is WeightsLocation.UNKNOWN
    assert model.thread_limit == 1


def test_what_lies_beside_a_bare_library_describes_it(tmp_path):
    library = bare(
        tmp_path,
        encoder_metadata__json=metadata(owner="us"),
        encoder__cpp=wrapper(2, "false"),
        encoder_weights__blob=b"1234",
        encoder__json='{"nodes": [{}]}',
    )
    package = open_package(library)
    model = package.model("encoder")
    assert model.metadata["owner"] == "us"
    assert model.weights is WeightsLocation.BLOB
    assert model.needs_proxy_executor
    assert package.wrapper_source() == wrapper(2, "false")
    extracted = package.extract(cache_dir=tmp_path / "cache")
    assert extracted.weights_blob.read_bytes() == b"1234"
    assert (extracted.library.with_suffix(".json")).exists()


def test_what_torch_names_by_a_hash_belongs_to_the_only_library_there(tmp_path):
    library = bare(
        tmp_path,
        abc__wrapper_metadata__json=metadata(owner="us"),
        abc__wrapper__cpp=wrapper(),
        k__kernel__cpp=PARALLEL,
    )
    model = open_package(library).model()
    assert (model.metadata["owner"], model.thread_limit) == ("us", 4)
    assert model.weights is WeightsLocation.IN_LIBRARY


def test_beside_another_library_such_files_belong_to_nobody(tmp_path):
    library = bare(
        tmp_path, other__so=elf(), abc__wrapper_metadata__json=metadata(), k__kernel__cpp=PARALLEL
    )
    model = open_package(library).model()
    assert (model.metadata, model.sources, model.thread_limit) == ({}, (), 1)


def test_a_bare_library_is_copied_so_that_the_next_build_cannot_pull_it_from_under_us(tmp_path):
    library = bare(tmp_path)
    extracted = open_package(library).extract(cache_dir=tmp_path / "cache")
    library.write_bytes(elf(b"next build"))
    assert extracted.library.read_bytes() == elf()
    assert extracted.library.name == "encoder.so"


def test_the_same_library_beside_other_weights_is_another_entry(tmp_path):
    library = bare(tmp_path, encoder_weights__blob=b"old!")
    old = open_package(library).extract(cache_dir=tmp_path / "cache")
    library.with_name("encoder_weights.blob").write_bytes(b"new!")
    new = open_package(library).extract(cache_dir=tmp_path / "cache")
    assert (old.weights_blob.read_bytes(), new.weights_blob.read_bytes()) == (b"old!", b"new!")


def test_a_hash_speaks_of_the_bare_library_itself(tmp_path):
    library = bare(tmp_path, encoder_weights__blob=b"1234")
    package = open_package(library)
    assert open_package(library, sha256=package.sha256).models == ("encoder",)
    with pytest.raises(PackageHashError):
        open_package(library, sha256="0" * 64)


def test_a_library_is_known_by_its_bytes_whatever_it_is_called(tmp_path):
    path = tmp_path / "encoder.pt2"
    path.write_bytes(elf())
    assert open_package(path).model().library == "encoder.pt2"


@pytest.mark.parametrize("content", [elf()[:40], elf(b"code", table=1000)])
def test_a_truncated_library_is_refused_before_it_kills_the_process(tmp_path, content):
    path = tmp_path / "encoder.so"
    path.write_bytes(content)
    with pytest.raises(
        PackageFormatError, match=r"encoder\.so is truncated: .* only \d+ bytes are there"
    ):
        open_package(path)


def test_a_library_of_another_system_says_nothing(tmp_path):
    path = tmp_path / "encoder.pyd"
    path.write_bytes(b"MZ" + bytes(100))
    assert open_package(path).model().machine == ""


def test_a_library_for_a_machine_without_a_name_here_says_nothing(tmp_path):
    path = tmp_path / "encoder.so"
    path.write_bytes(elf(machine=9999))
    assert open_package(path).model().machine == ""
