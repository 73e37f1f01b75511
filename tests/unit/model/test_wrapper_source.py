"""What is read out of the C++ that torch generates about writes: to buffers, and to inputs."""

import pytest

from aoti_sched.model.specs import ConstantSpec, ModelSpec
from aoti_sched.model.wrapper_source import MAY_WRITE, WRITES, writes_in, writes_to_buffers

HEAD = """
    constants_info_[{index}].name = "{name}";
    constants_info_[{index}].type = static_cast<int32_t>(torch::aot_inductor::ConstantType::{kind});
    constants_info_[{index}].original_fqn = "{name}";
"""
BODY = """
void AOTInductorModel::run_impl(
    AtenTensorHandle* input_handles
) {{
    auto inputs = steal_from_raw_handles_to_raii_handles(input_handles, 1);
    auto arg0_1 = std::move(inputs[0]);
    [[maybe_unused]] auto& table = constants_->at(0);
    auto arg0_1_size = arg0_1.sizes();
    if (_check()) {{ assert_size_stride(arg0_1, {{4L}}, {{1L}}, "input"); }}
{code}
    arg0_1.reset();
    output_handles[0] = buf0.release();
}} // AOTInductorModel::run_impl
"""


def wrapper(code, kind="Buffer"):
    return HEAD.format(index=0, name="table", kind=kind) + BODY.format(code=code)


TRITON = """
template <typename in_ptr0_type_, typename out_ptr0_type_>
static inline void call_triton_poi_0(
    const in_ptr0_type_& in_ptr0,
    const out_ptr0_type_& out_ptr0,
    int64_t xnumel
) { }
"""
READS = {
    "not used": "",
    "a kernel reads": "    cpp_fused_0((const float*)(table.data_ptr()), "
    "(float*)(buf0.data_ptr()));",
    "an operator reads": "    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(buf0, buf1, "
    "table));",
    "an operator of several results reads": "    aoti_torch_cpu_convolution(buf1, table, 0, 1, "
    "&buf0_handle);",
    "a view is read": "    aoti_torch_cpu_mm_out(buf0, buf1, "
    "wrap(reinterpret_tensor_wrapper(table, 2, a, b, 0L)));",
    "a named view is read": "    auto var_0 = wrap(reinterpret_tensor_wrapper(table, 2, a, b, "
    "0L));\n"
    "    aoti_torch_cpu_mm_out(buf0, buf1, var_0);",
    "it is returned": "    aoti_torch_clone(table, &output_handles[1]);",
    "a comment names it": "    // table, table.add_(x), (float*)(table.data_ptr())",
    "a device's kernel reads": "    call_triton_poi_0(table, buf0, 4L);",
}
WRITES_TO_IT = {
    "a kernel writes": "    cpp_fused_0((const float*)(table.data_ptr()), "
    "(float*)(table.data_ptr()));",
    "an operator copies": "    aoti_torch_copy_(table, buf1, 0);",
    "an operator works in place": "    aoti_torch_cpu_fill__Scalar(table, 1.0);",
    "an operator has it as its result": "    aoti_torch_cpu_mm_out(table, buf1, buf2);",
    "a named view is written": "    auto var_0 = wrap(reinterpret_tensor_wrapper(table, 2, a, b, "
    "0L));\n"
    "    aoti_torch_zero_(var_0);",
    "a device's kernel writes": "    call_triton_poi_0(buf0, table, 4L);",
}
UNKNOWN = {
    "a custom operator takes it": "    aoti_torch_proxy_executor_call_function(proxy_executor, 0, "
    "0, nullptr, 1, "
    "std::array<AtenTensorHandle, 1>{table}.data());",
    "something new": "    frobnicate(table);",
}


@pytest.mark.parametrize("code", READS.values(), ids=READS)
def test_a_buffer_that_is_only_read_is_not_written(code):
    source = wrapper(code) + TRITON
    assert writes_in(source).constants == {"table": False}
    assert writes_to_buffers(None, source) == ""


@pytest.mark.parametrize("code", WRITES_TO_IT.values(), ids=WRITES_TO_IT)
def test_a_buffer_that_is_written_is_found(code):
    source = wrapper(code) + TRITON
    assert writes_in(source).constants == {"table": True}
    assert writes_to_buffers(None, source) == WRITES


@pytest.mark.parametrize("code", UNKNOWN.values(), ids=UNKNOWN)
def test_a_use_of_a_buffer_that_is_not_understood_counts_as_a_write(code):
    source = wrapper(code)
    assert writes_in(source).constants == {"table": None}
    assert writes_to_buffers(None, source) == MAY_WRITE


def test_a_use_of_a_parameter_that_is_not_understood_is_no_write():
    assert writes_to_buffers(None, wrapper(UNKNOWN["something new"], kind="Parameter")) == ""


def test_a_parameter_that_is_written_is_state_too():
    assert (
        writes_to_buffers(None, wrapper(WRITES_TO_IT["a kernel writes"], kind="Parameter"))
        == WRITES
    )


def test_an_input_that_is_written_is_found():
    code = "    cpp_fused_0((const float*)(arg0_1.data_ptr()), (float*)(arg0_1.data_ptr()));"
    assert writes_in(wrapper(code)).inputs == (True,)


def test_an_input_that_is_only_read_is_not_written():
    assert writes_in(wrapper("    cpp_fused_0((const float*)(arg0_1.data_ptr()));")).inputs == (
        False,
    )


def constant(kind):
    return ConstantSpec("table", "table", "float32", (4,), 16, kind, folded=False)


@pytest.mark.parametrize("source", [None, "", "// generated", "void AOTInductorModel::run_impl("])
def test_without_a_source_a_model_with_buffers_counts_as_writing(source):
    assert writes_to_buffers(None, source, [constant("buffer")]) == MAY_WRITE
    assert writes_to_buffers(None, source, [constant("parameter")]) == ""


def test_our_own_package_says_it_itself():
    own = ModelSpec(inputs=(), outputs=(), parameters=())
    assert writes_to_buffers(own, None, [constant("buffer")]) == ""
