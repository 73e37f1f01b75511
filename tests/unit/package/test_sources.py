"""What `sources` reads out of generated C++; the lines are as torch's code generator prints
them.
"""

import pytest

from aoti_sched.package.sources import (
    ThreadFacts,
    WeightFacts,
    constant_layouts,
    thread_facts,
    weight_facts,
)

REDUCTION = """
extern "C"  void  cpp_fused_sum_0(const float* in_ptr0, float* out_ptr0)
{{
    at::vec::Vectorized<float> tmp_acc0_vec_arr[{arrays}];
    float tmp_acc0_arr[{arrays}];
    #pragma omp parallel{clause}
    {{
        int tid = omp_get_thread_num();
        tmp_acc0_vec_arr[tid] = tmp_acc0_vec_local;
        tmp_acc0_arr[tid] = tmp_acc0_local;
    }}
}}
"""


def reduction(arrays: object, clause: str = "") -> str:
    return REDUCTION.format(arrays=arrays, clause=clause)


def test_a_kernel_without_parallel_regions_sets_no_limit():
    assert thread_facts(['extern "C" void kernel() { tmp0 = in[0]; }']) == ThreadFacts(None, None)


def test_no_source_at_all_states_nothing():
    assert thread_facts([]) == ThreadFacts(None, None)


def test_a_fixed_number_of_threads_is_both_limit_and_fixed():
    assert thread_facts([reduction(4, " num_threads(4)")]) == ThreadFacts(limit=4, fixed=4)


def test_a_bare_pragma_is_limited_by_its_reduction_arrays():
    assert thread_facts([reduction(6)]) == ThreadFacts(limit=6, fixed=None)


def test_arrays_sized_at_run_time_set_no_limit():
    assert thread_facts([reduction("max_threads")]) == ThreadFacts(None, None)


def test_the_smallest_limit_and_the_largest_fixed_number_of_all_kernels_count():
    sources = [reduction(8, " num_threads(8)") + reduction(3), reduction(5, " num_threads(5)")]
    assert thread_facts(sources) == ThreadFacts(limit=3, fixed=8)


def test_an_array_that_holds_the_tail_of_a_loop_says_nothing_about_threads():
    tail = (
        'extern "C" void tail()\n{\n float tmp_acc0_arr[2];\n tmp_acc0_arr[x0_tail - 8L] = '
        "tmp_acc0;\n}\n"
    )
    assert thread_facts([reduction(6) + tail]).limit == 6


def test_the_pragma_of_a_blocked_matrix_product_counts():
    source = (
        "    #pragma omp parallel for num_threads(7)\n    for (int64_t b_start = 0; b_start < 7; "
        "++b_start) {}"
    )
    assert thread_facts([source]) == ThreadFacts(limit=7, fixed=7)


def test_arrays_as_the_microsoft_compiler_needs_them_are_read():
    source = reduction(6).replace(
        "float tmp_acc0_arr[6];", "auto tmp_acc0_arr = std::make_unique<float[]>(2);"
    )
    assert thread_facts([source]).limit == 2


def test_the_scratch_of_an_attention_kernel_is_a_limit():
    source = (
        'extern "C" void cpp_flex_attention()\n{\n  int64_t num_thread = 4;\n  int ompIdx = '
        "at::get_thread_num();\n}"
    )
    assert thread_facts([source]) == ThreadFacts(limit=4, fixed=None)


@pytest.mark.parametrize(("include", "in_library"), [("true", True), ("false", False)])
def test_the_wrapper_says_whether_the_library_brings_the_weights(include, in_library):
    source = (
        f"    : AOTInductorModelBase(1,\n  2,\n  5,\n  device_str,\n  std::move(cubin_dir),\n  "
        f"{include}) {{"
    )
    assert weight_facts(source) == WeightFacts(constants=5, in_library=in_library)


def test_a_wrapper_older_than_the_choice_has_its_weights_inside():
    source = ": AOTInductorModelBase(1, 1, 5, device_str, cubin_dir) {"
    assert weight_facts(source) == WeightFacts(constants=5, in_library=True)


def test_a_wrapper_without_the_constructor_says_nothing():
    assert weight_facts("int main() {}") is None


def test_the_wrapper_says_how_constants_lie_in_memory():
    source = """
    constants_info_[0].name = "weight";
    constants_info_[0].shape = {4, 12};
    constants_info_[0].stride = {1, 4};
    constants_info_[0].layout = static_cast<int32_t>(cached_torch_layout_strided);
    constants_info_[1].name = "count";
    constants_info_[1].shape = {};
    constants_info_[1].stride = {};
    constants_info_[2].name = "torn";
    constants_info_[2].shape = {3};
"""
    assert constant_layouts(source) == {"weight": ((4, 12), (1, 4)), "count": ((), ())}


def test_the_wrapper_says_how_large_the_constants_are():
    source = ": AOTInductorModelBase(1, 1, 2, device_str, cubin_dir) {\n"
    for index, size in enumerate((1024, 36)):
        source += (
            f"    constants_info_[{index}].offset = 0;\n    constants_info_[{index}].data_size = "
            f"{size};\n"
        )
    assert weight_facts(source).bytes == 1060
