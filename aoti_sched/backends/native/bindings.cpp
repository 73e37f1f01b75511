// The module `_native`: the Python names of the lanes. Addresses are plain integers.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "constant_map.hpp"
#include "gil.hpp"
#include "py_lanes.hpp"
#include "py_types.hpp"
#include "tensors.hpp"

namespace nb = nanobind;

namespace {

aoti::Shim make_shim(std::uintptr_t get_data_ptr, std::uintptr_t get_dim, std::uintptr_t get_sizes,
                     std::uintptr_t get_strides, std::uintptr_t get_dtype,
                     std::uintptr_t dtype_element_size, std::uintptr_t empty_strided,
                     std::uintptr_t reinterpret_tensor, std::uintptr_t clone,
                     std::uintptr_t delete_tensor, std::int32_t cpu) {
  aoti::Shim shim;
  const auto set = [](auto& function, std::uintptr_t address) {
    if (address == 0) throw std::invalid_argument("each function must be given");
    function = aoti::at<std::remove_reference_t<decltype(function)>>(address);
  };
  set(shim.get_data_ptr, get_data_ptr);
  set(shim.get_dim, get_dim);
  set(shim.get_sizes, get_sizes);
  set(shim.get_strides, get_strides);
  set(shim.get_dtype, get_dtype);
  set(shim.dtype_element_size, dtype_element_size);
  set(shim.empty_strided, empty_strided);
  set(shim.reinterpret_tensor, reinterpret_tensor);
  set(shim.clone, clone);
  set(shim.delete_tensor, delete_tensor);
  shim.cpu = cpu;
  return shim;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Native lanes: threads that run compiled models and never touch Python.";
  aoti::watch_forks();

  nb::exception<aoti::Forked>(module, "ForkedError", PyExc_RuntimeError);

  nb::class_<aoti::PyModel>(module, "Model")
      .def(
          "__init__",
          [](aoti::PyModel* self, std::uintptr_t run, std::uintptr_t container,
             std::size_t num_inputs, std::size_t num_outputs, std::uintptr_t last_error,
             std::uintptr_t proxy_executor) {
            if (run == 0) throw std::invalid_argument("run must be given");
            new (self) aoti::PyModel{
                std::make_shared<const aoti::Model>(aoti::Model{
                    aoti::at<aoti::RunFunction>(run), aoti::at<void*>(container), num_inputs,
                    num_outputs, aoti::at<aoti::LastErrorFunction>(last_error),
                    aoti::at<void*>(proxy_executor)}),
                {}};
          },
          nb::kw_only(), nb::arg("run"), nb::arg("container"), nb::arg("num_inputs"),
          nb::arg("num_outputs"), nb::arg("last_error") = 0, nb::arg("proxy_executor") = 0);

  nb::class_<aoti::Tensors>(module, "Tensors")
      .def(
          "__init__",
          [](aoti::Tensors* self, nb::object type, nb::object to_capsules, nb::object from_capsules,
             std::uintptr_t new_handle, std::uintptr_t wrap) {
            new (self)
                aoti::Tensors(std::move(type), std::move(to_capsules), std::move(from_capsules),
                              aoti::at<aoti::Tensors::NewHandle>(new_handle),
                              aoti::at<aoti::Tensors::Wrap>(wrap));
          },
          nb::arg("type"), nb::arg("to_capsules"), nb::arg("from_capsules"), nb::kw_only(),
          nb::arg("new_handle") = 0, nb::arg("wrap") = 0);

  nb::class_<aoti::Shim>(module, "Shim")
      .def(
          "__init__",
          [](aoti::Shim* self, std::uintptr_t get_data_ptr, std::uintptr_t get_dim,
             std::uintptr_t get_sizes, std::uintptr_t get_strides, std::uintptr_t get_dtype,
             std::uintptr_t dtype_element_size, std::uintptr_t empty_strided,
             std::uintptr_t reinterpret_tensor, std::uintptr_t clone, std::uintptr_t delete_tensor,
             std::int32_t cpu) {
            new (self) aoti::Shim(make_shim(get_data_ptr, get_dim, get_sizes, get_strides,
                                            get_dtype, dtype_element_size, empty_strided,
                                            reinterpret_tensor, clone, delete_tensor, cpu));
          },
          nb::kw_only(), nb::arg("get_data_ptr"), nb::arg("get_dim"), nb::arg("get_sizes"),
          nb::arg("get_strides"), nb::arg("get_dtype"), nb::arg("dtype_element_size"),
          nb::arg("empty_strided"), nb::arg("reinterpret_tensor"), nb::arg("clone"),
          nb::arg("delete_tensor"), nb::arg("cpu"));

  nb::class_<aoti::PyPlan>(module, "Plan")
      .def(
          "__init__",
          [](aoti::PyPlan* self, const aoti::Shim& shim, const std::vector<aoti::PyInput>& inputs,
             const std::vector<aoti::PyOutput>& outputs, bool detach_rows) {
            new (self) aoti::PyPlan{aoti::make_plan(shim, inputs, outputs, detach_rows)};
          },
          nb::arg("shim"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("detach_rows"));

  nb::class_<aoti::PyDevice>(module, "Device")
      .def(
          "__init__",
          [](aoti::PyDevice* self, const aoti::Shim& shim, std::int32_t type, std::int32_t index,
             bool one_at_a_time, const std::map<std::string, std::uintptr_t>& functions,
             std::uintptr_t context, std::int32_t not_ready, std::uintptr_t asked) {
            new (self) aoti::PyDevice{aoti::make_device(shim, type, index, one_at_a_time, functions,
                                                        context, not_ready, asked)};
          },
          nb::arg("shim"), nb::kw_only(), nb::arg("type"), nb::arg("index"),
          nb::arg("one_at_a_time"), nb::arg("functions"), nb::arg("context") = 0,
          nb::arg("not_ready") = 0, nb::arg("asked") = 0)
      .def(
          "arrive",
          [](const aoti::PyDevice& self, std::uintptr_t stream) {
            const aoti::Driver& driver = self.device->driver;
            if (driver.record_event == nullptr || driver.wait_for_event == nullptr ||
                driver.make_event == nullptr || driver.is_capturing == nullptr)
              throw std::invalid_argument("the device records no events");
            return aoti::PyArrival{
                std::make_shared<const aoti::Arrival>(self.device, aoti::at<void*>(stream))};
          },
          nb::arg("stream"),
          "Record an event on a stream. Does not block. Raises RuntimeError, also while the stream "
          "is recorded into a graph.");

  nb::class_<aoti::PyArrival>(module, "Arrival")
      .def(
          "precede",
          [](const aoti::PyArrival& self, std::uintptr_t stream) {
            self.arrival->precede(aoti::at<void*>(stream));
          },
          nb::arg("stream"), "Let later work on a stream wait for this point. Does not block.");

  nb::class_<aoti::PyStream>(module, "Stream")
      .def(
          "__init__",
          [](aoti::PyStream* self, const aoti::PyDevice& device, std::uintptr_t handle,
             std::uintptr_t fence, std::uintptr_t wait, std::uintptr_t argument,
             std::vector<bool> brought, bool home, std::uintptr_t event, std::size_t bytes_in,
             std::size_t bytes_out) {
            if ((fence == 0) == (wait == 0))
              throw std::invalid_argument("fence and wait: one of both");
            const aoti::Driver& driver = device.device->driver;
            if (event != 0 && (driver.record_event == nullptr || driver.query_event == nullptr))
              throw std::invalid_argument("the device records no events");
            const aoti::Fence how{aoti::at<aoti::FenceFunction>(fence),
                                  aoti::at<void (*)(void*)>(wait), aoti::at<void*>(argument),
                                  aoti::at<void*>(event)};
            new (self) aoti::PyStream{
                std::make_shared<aoti::Stream>(device.device, aoti::at<void*>(handle), how,
                                               std::move(brought), home, bytes_in, bytes_out)};
          },
          nb::arg("device"), nb::kw_only(), nb::arg("handle"), nb::arg("fence") = 0,
          nb::arg("wait") = 0, nb::arg("argument"), nb::arg("brought"), nb::arg("home"),
          nb::arg("event") = 0, nb::arg("bytes_in") = 0, nb::arg("bytes_out") = 0);

  nb::class_<aoti::PyGraph>(module, "Graph")
      .def(
          "__init__",
          [](aoti::PyGraph* self, const aoti::PyDevice& device, std::uintptr_t executable,
             const std::vector<std::uintptr_t>& inputs,
             const std::vector<std::uintptr_t>& outputs) {
            new (self) aoti::PyGraph{aoti::make_graph(device, executable, inputs, outputs)};
          },
          nb::arg("device"), nb::kw_only(), nb::arg("executable"), nb::arg("inputs"),
          nb::arg("outputs"));

  module.def(
      "take_turn",
      [] {
        const aoti::ReleasedGil released;
        aoti::process_lock().lock();
      },
      "Wait for the process's lock on devices that take one work at a time. A thread may take the "
      "lock again.");
  module.def(
      "end_turn", [] { aoti::process_lock().unlock(); },
      "Release the lock on the thread that took it.");
  module.def(
      "wait_for_detached_threads",
      [](bool others) {
        aoti::ReleasedGil::wait_for_detached_threads();
        if (others) nb::set_leak_warnings(false);
      },
      nb::arg("others"),
      "Wait for threads that are in this module without the GIL. Call this at interpreter exit. "
      "The lanes are closed by then. "
      "Args: others: Whether other threads still run, so that the objects they keep are no leaks.");

#ifdef AOTI_CONSTANT_MAPS
  nb::class_<aoti::ConstantMap>(module, "ConstantMap")
      .def(nb::init<const aoti::ConstantMap::Pairs&>(), nb::arg("pairs"))
      .def("address", &aoti::ConstantMap::address,
           "Return the map's address, which is valid while this object lives.")
      .def("pairs", &aoti::ConstantMap::pairs, "Return the names and handles, in no order.");
#endif

  nb::class_<aoti::PyLanes>(module, "Lanes")
      .def(nb::init<std::vector<std::string>, std::vector<int>, int, aoti::Tensors, std::uintptr_t,
                    std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::size_t, std::size_t>(),
           nb::arg("names"), nb::arg("affinities"), nb::arg("cores"), nb::arg("tensors"),
           nb::kw_only(), nb::arg("delete_tensor"), nb::arg("root_cause") = 0,
           nb::arg("get_threads") = 0, nb::arg("set_omp_threads") = 0,
           nb::arg("set_mkl_threads") = 0, nb::arg("new_handle") = 0, nb::arg("threads") = 0,
           nb::arg("open") = 0)
      .def("submit", &aoti::PyLanes::submit, nb::arg("lane"), nb::arg("token"), nb::arg("model"),
           nb::arg("inputs"), nb::arg("threads"), nb::arg("on").none() = nb::none(),
           nb::arg("graph").none() = nb::none(), nb::arg("after").none() = nb::none(),
           nb::arg("consumers").none() = nb::none(),
           "Hand a work to a lane. When this call raises, the lane has taken nothing.")
      .def("submit_batch", &aoti::PyLanes::submit_batch, nb::arg("lane"), nb::arg("token"),
           nb::arg("model"), nb::arg("plan"), nb::arg("members"), nb::arg("rows"),
           nb::arg("padded_rows"), nb::arg("slot"), nb::arg("threads"),
           nb::arg("on").none() = nb::none(), nb::arg("graph").none() = nb::none(),
           nb::arg("consumers").none() = nb::none(),
           "Hand a batch to a lane, as `submit` does. Keep the returned object until the work is "
           "drained: the lane reads "
           "the members' memory.")
      .def("drain", &aoti::PyLanes::drain, nb::arg("limit"),
           "Return at most `limit` completions, oldest first.")
      .def("run_here", &aoti::PyLanes::run_here, nb::arg("model"), nb::arg("inputs"),
           nb::arg("threads"), nb::arg("on").none() = nb::none(),
           nb::arg("graph").none() = nb::none(), nb::arg("after").none() = nb::none(),
           nb::arg("consumers").none() = nb::none(),
           "Run on the calling thread, and return a completion as `drain` does. The GIL is held, "
           "unless the run is on a "
           "device. The thread's own intra-op counts are restored.")
      .def("run_batch_here", &aoti::PyLanes::run_batch_here, nb::arg("model"), nb::arg("plan"),
           nb::arg("members"), nb::arg("rows"), nb::arg("padded_rows"), nb::arg("slot"),
           nb::arg("threads"), nb::arg("on").none() = nb::none(),
           nb::arg("graph").none() = nb::none(), nb::arg("consumers").none() = nb::none(),
           "Run a batch on the calling thread, as `run_here` does.")
      .def("poll", &aoti::PyLanes::poll, nb::arg("seconds"),
           "Spin without the GIL for at most `seconds`. Return whether a completion waits.")
      .def("wake", &aoti::PyLanes::wake, "Make the descriptor readable.")
      .def("fileno", &aoti::PyLanes::fileno)
      .def("count", &aoti::PyLanes::count)
      .def("grow", &aoti::PyLanes::grow, nb::arg("count"),
           "Open lanes until there are `count`. Any thread may call this.")
      .def("close", &aoti::PyLanes::close, "Wait for the submitted works, then join the threads.")
      .def("hang_up", &aoti::PyLanes::hang_up,
           "Close the lanes and the descriptor. `fileno` then returns -1.");
}
