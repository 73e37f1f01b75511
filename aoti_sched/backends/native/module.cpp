// The Python face of the lanes. Tensors come and go as themselves; everything else is numbers.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>

#include <pthread.h>
#include <unistd.h>

#include "batch.hpp"
#include "lane.hpp"
#include "stream.hpp"
#include "tensors.hpp"

namespace nb = nanobind;

namespace {

// A forked child has the lanes' memory and none of their threads.
std::atomic<int> forks{0};

struct Forked : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Gives the GIL up for as long as it lives.
//
// When the interpreter ends, a thread that wants the GIL back is ended by Python, in a way that ends the process where C++ has promised not to
// throw, as nanobind has. So those who are away are waited for before that (`come_home`), and of whoever goes later, none comes back.
class WithoutGil {
 public:
  WithoutGil() : state_(nullptr) {
    const bool stays_away = ended && PyThread_get_thread_ident() != last;
    if (!stays_away) ++away;
    state_ = PyEval_SaveThread();
    while (stays_away) pause();
  }
  ~WithoutGil() {
    PyEval_RestoreThread(state_);
    --away;
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // To be called by the thread that ends the interpreter, when lanes wait for nobody any more.
  static void come_home() {
    ended = true;
    last = PyThread_get_thread_ident();
    while (away > 0) {
      PyThreadState* const state = PyEval_SaveThread();
      std::this_thread::yield();
      PyEval_RestoreThread(state);
    }
  }

 private:
  PyThreadState* state_;
  // All guarded by the GIL.
  static inline int away = 0;
  static inline bool ended = false;
  static inline unsigned long last = 0;
};

struct PyModel {
  explicit PyModel(aoti::Model its_model) : model(its_model) {}
  PyModel(const PyModel&) = delete;
  PyModel& operator=(const PyModel&) = delete;

  aoti::Model model;
  std::unordered_map<std::size_t, std::unique_ptr<aoti::Staging>> stagings;  // by slot

  aoti::Staging* staging(std::size_t slot) {
    std::unique_ptr<aoti::Staging>& staging = stagings[slot];
    if (staging == nullptr) staging = std::make_unique<aoti::Staging>();
    return staging.get();
  }
};

struct PyPlan {
  std::shared_ptr<const aoti::Plan> plan;
};

struct PyDevice {
  std::shared_ptr<const aoti::Device> device;
};

struct PyStream {
  std::shared_ptr<aoti::Stream> stream;
};

struct PyGraph {
  std::shared_ptr<const aoti::Graph> graph;
};

// The compiled models' code reads and fills this very map, so its std::string must be theirs. Torch's wheels have the new
// one since 2.6; a module built with the old one does without maps.
#if !defined(_GLIBCXX_USE_CXX11_ABI) || _GLIBCXX_USE_CXX11_ABI
#define AOTI_CONSTANT_MAPS
struct PyConstantMap {
  explicit PyConstantMap(const std::vector<std::pair<std::string, std::uintptr_t>>& pairs) {
    for (const auto& [name, handle] : pairs) map.emplace(name, reinterpret_cast<aoti::Handle>(handle));
  }

  std::uintptr_t address() { return reinterpret_cast<std::uintptr_t>(&map); }

  std::vector<std::pair<std::string, std::uintptr_t>> pairs() const {
    std::vector<std::pair<std::string, std::uintptr_t>> pairs;
    for (const auto& [name, handle] : map) pairs.emplace_back(name, reinterpret_cast<std::uintptr_t>(handle));
    return pairs;
  }

  std::unordered_map<std::string, aoti::Handle> map;
};
#endif

template <typename Function>
Function at(std::uintptr_t address) {
  return reinterpret_cast<Function>(address);
}

nb::object text(const std::string& bytes) {
  return nb::steal(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

aoti::Shim shim(std::uintptr_t get_data_ptr, std::uintptr_t get_dim, std::uintptr_t get_sizes,
                std::uintptr_t get_strides, std::uintptr_t get_dtype, std::uintptr_t dtype_element_size,
                std::uintptr_t empty_strided, std::uintptr_t reinterpret_tensor, std::uintptr_t clone,
                std::uintptr_t delete_tensor, std::int32_t cpu) {
  aoti::Shim shim;
  const auto set = [](auto& function, std::uintptr_t address) {
    if (address == 0) throw std::invalid_argument("each function must be given");
    function = at<std::remove_reference_t<decltype(function)>>(address);
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

std::shared_ptr<const aoti::Device> make_device(const aoti::Shim& shim, std::int32_t type, std::int32_t index,
                                                bool one_at_a_time,
                                                const std::map<std::string, std::uintptr_t>& functions,
                                                std::uintptr_t context) {
  auto made = std::make_shared<aoti::Device>();
  aoti::Device& device = *made;
  std::size_t found = 0;
  const auto set = [&](auto& function, const char* name) {
    const auto entry = functions.find(name);
    if (entry == functions.end()) return;
    function = at<std::remove_reference_t<decltype(function)>>(entry->second);
    ++found;
  };
  device.shim = shim;
  device.type = type;
  device.index = index;
  device.one_at_a_time = one_at_a_time;
  device.driver.context = at<void*>(context);
  set(device.new_handle, "new_handle");
  set(device.get_device_type, "get_device_type");
  set(device.copy, "copy");
  set(device.guard, "guard");
  set(device.unguard, "unguard");
  set(device.driver.get_context, "get_context");
  set(device.driver.set_context, "set_context");
  set(device.driver.query, "query");
  set(device.driver.copy_in, "copy_in");
  set(device.driver.copy_out, "copy_out");
  set(device.driver.allocate_host, "allocate_host");
  set(device.driver.free_host, "free_host");
  set(device.driver.launch_graph, "launch_graph");
  set(device.driver.explain, "explain");
  if (found != functions.size()) throw std::invalid_argument("a device has no function of that name");
  if (device.new_handle == nullptr || device.get_device_type == nullptr || device.copy == nullptr) {
    throw std::invalid_argument("new_handle, get_device_type and copy must be given");
  }
  if ((device.guard == nullptr) != (device.unguard == nullptr)) {
    throw std::invalid_argument("guard and unguard: both or none");
  }
  const aoti::Driver& driver = device.driver;
  const bool some = driver.copy_in != nullptr || driver.copy_out != nullptr || driver.allocate_host != nullptr;
  const bool all = driver.get_context != nullptr && driver.set_context != nullptr && driver.copy_in != nullptr && driver.copy_out != nullptr &&
                   driver.allocate_host != nullptr && driver.free_host != nullptr;
  if (some && !all) throw std::invalid_argument("a driver's functions: all or none");
  return made;
}

using PyInput = std::tuple<std::size_t, std::vector<std::size_t>, std::vector<std::size_t>, std::map<int, nb::bytes>>;
using PyOutput = std::tuple<std::size_t, std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>>;

std::shared_ptr<const aoti::Plan> make_plan(const aoti::Shim& shim, const std::vector<PyInput>& inputs,
                                            const std::vector<PyOutput>& outputs, bool detach_rows) {
  std::vector<aoti::InputPlan> all_in;
  for (const auto& [dim, order, ragged, pads] : inputs) {
    aoti::InputPlan input{dim, order, ragged, {}};
    for (const auto& [dtype, pad] : pads) input.pads[dtype] = std::string(pad.c_str(), pad.size());
    all_in.push_back(std::move(input));
  }
  std::vector<aoti::OutputPlan> all_out;
  for (const auto& [dim, ragged] : outputs) {
    aoti::OutputPlan output{dim, {}};
    for (const auto& [of, input, input_dim] : ragged) output.ragged.push_back({of, input, input_dim});
    all_out.push_back(std::move(output));
  }
  return std::make_shared<const aoti::Plan>(shim, std::move(all_in), std::move(all_out), detach_rows);
}

class PyLanes {
 public:
  PyLanes(std::vector<std::string> names, std::vector<int> affinities, int cores, aoti::Tensors tensors,
          std::uintptr_t delete_tensor, std::uintptr_t root_cause, std::uintptr_t get_threads,
          std::uintptr_t set_omp_threads, std::uintptr_t set_mkl_threads, std::uintptr_t new_handle,
          std::size_t threads)
      : born_(forks),
        tensors_(std::move(tensors)),
        lanes_(std::make_unique<aoti::Lanes>(
            runtime(delete_tensor, root_cause, get_threads, set_omp_threads, set_mkl_threads, new_handle),
            std::move(names),
            std::move(affinities), cores, threads)) {}

  ~PyLanes() {
    // In a forked child the threads are missing, and joining them would never end: let the memory be.
    if (forks != born_) static_cast<void>(lanes_.release());
    close();  // without the GIL: an operator of the model may be written in Python, and wait for it
  }
  PyLanes(const PyLanes&) = delete;
  PyLanes& operator=(const PyLanes&) = delete;

  void submit(std::size_t lane, std::uint64_t token, const PyModel& model, nb::handle inputs, int threads,
              std::uintptr_t stream, std::uintptr_t fence, std::uintptr_t fence_argument, const PyStream* on,
              const PyGraph* graph) {
    if (lane >= lanes_->count()) throw nb::index_error("no such lane");
    aoti::Work work = make_work(model, inputs, threads);
    place(work, model, on, graph);
    hand_over(lane, token, work, stream, fence, fence_argument);
  }

  nb::object submit_batch(std::size_t lane, std::uint64_t token, PyModel& model, const PyPlan& plan, nb::handle members,
                          nb::handle rows, std::int64_t padded_rows, std::size_t slot, int threads,
                          std::uintptr_t stream, std::uintptr_t fence, std::uintptr_t fence_argument,
                          const PyStream* on, const PyGraph* graph) {
    if (lane >= lanes_->count()) throw nb::index_error("no such lane");
    auto [work, tensors] = make_batch(model, plan, members, rows, padded_rows, slot, threads);
    place(work, model, on, graph);
    hand_over(lane, token, work, stream, fence, fence_argument);
    return tensors;
  }

  nb::list drain(std::size_t limit) {
    refuse_in_child();
    nb::list taken;
    for (aoti::Completion& completion : lanes_->drain(limit)) taken.append(give(completion));
    return taken;
  }

  nb::object run_here(const PyModel& model, nb::handle inputs, int threads, const PyStream* on, const PyGraph* graph) {
    aoti::Work work = make_work(model, inputs, threads);
    place(work, model, on, graph);
    return give_here(work);
  }

  nb::object run_batch_here(PyModel& model, const PyPlan& plan, nb::handle members, nb::handle rows,
                            std::int64_t padded_rows, std::size_t slot, int threads, const PyStream* on,
                            const PyGraph* graph) {
    auto [work, tensors] = make_batch(model, plan, members, rows, padded_rows, slot, threads);
    place(work, model, on, graph);
    return give_here(work);
  }

  bool poll(double seconds) {
    refuse_in_child();
    const WithoutGil without_gil;
    return lanes_->poll(std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9)));
  }

  void ring() { lanes_->ring(); }
  int fileno() const { return lanes_->descriptor(); }
  std::size_t count() const { return lanes_->count(); }

  void close() {
    if (forks != born_) return;
    const WithoutGil without_gil;
    lanes_->close();
  }

  void hang_up() {
    if (forks != born_) return;
    const WithoutGil without_gil;
    lanes_->hang_up();
  }

 private:
  static aoti::Runtime runtime(std::uintptr_t delete_tensor, std::uintptr_t root_cause, std::uintptr_t get_threads,
                               std::uintptr_t set_omp_threads, std::uintptr_t set_mkl_threads,
                               std::uintptr_t new_handle) {
    if (delete_tensor == 0) throw std::invalid_argument("delete_tensor must be given");
    aoti::Runtime runtime;
    runtime.delete_tensor = at<std::int32_t (*)(aoti::Handle)>(delete_tensor);
    runtime.root_cause = at<const char* (*)()>(root_cause);
    runtime.get_threads = at<int (*)()>(get_threads);
    runtime.set_omp_threads = at<void (*)(int)>(set_omp_threads);
    runtime.set_mkl_threads = at<int (*)(int)>(set_mkl_threads);
    runtime.new_handle = at<std::int32_t (*)(aoti::Handle, aoti::Handle*)>(new_handle);
    return runtime;
  }

  aoti::Work make_work(const PyModel& model, nb::handle inputs, int threads) const {
    refuse_in_child();
    aoti::Work work;
    work.model = &model.model;
    work.inputs = tensors_.handles_of(inputs, model.model.num_inputs, lanes_->runtime());
    work.threads = threads;
    return work;
  }

  // A batch and the tensors that must be kept until it is over.
  std::pair<aoti::Work, nb::object> make_batch(PyModel& model, const PyPlan& plan, nb::handle members, nb::handle rows,
                                               std::int64_t padded_rows, std::size_t slot, int threads) const {
    refuse_in_child();
    if (plan.plan->inputs.size() != model.model.num_inputs || plan.plan->outputs.size() != model.model.num_outputs) {
      throw std::invalid_argument("the plan is not this model's: it has other numbers of inputs or outputs");
    }
    std::vector<aoti::Handle> borrowed;
    nb::object tensors = tensors_.borrow(members, model.model.num_inputs, borrowed);
    aoti::Work work;
    work.model = &model.model;
    work.threads = threads;
    work.batch = std::make_unique<aoti::Batch>(plan.plan, model.staging(slot), std::move(borrowed),
                                               nb::cast<std::vector<std::int64_t>>(rows), padded_rows);
    return {std::move(work), std::move(tensors)};
  }

  // Where the work runs, and what is launched there in the place of the model.
  void place(aoti::Work& work, const PyModel& model, const PyStream* on, const PyGraph* graph) const {
    if (on != nullptr) work.on = on->stream;
    if (graph == nullptr) return;
    if (on == nullptr || graph->graph->inputs.size() != model.model.num_inputs ||
        graph->graph->outputs.size() != model.model.num_outputs) {
      for (aoti::Handle handle : work.inputs) lanes_->runtime().delete_tensor(handle);
      throw std::invalid_argument("the graph is not this model's, or no stream was given for it");
    }
    work.graph = graph->graph;
  }

  nb::object give_here(aoti::Work& work) const {
    aoti::Completion completion;
    if (work.on == nullptr) {
      completion = aoti::run_here(lanes_->runtime(), work);
    } else {
      const WithoutGil without_gil;  // a device is waited for, perhaps one that Python works on, too
      completion = aoti::run_here(lanes_->runtime(), work);
    }
    return give(completion);
  }

  void hand_over(std::size_t lane, std::uint64_t token, aoti::Work& work, std::uintptr_t stream, std::uintptr_t fence,
                 std::uintptr_t fence_argument) {
    work.token = token;
    work.stream = at<void*>(stream);
    work.fence = at<aoti::FenceFunction>(fence);
    work.fence_argument = at<void*>(fence_argument);
    if (lanes_->submit(lane, work)) return;
    for (aoti::Handle handle : work.inputs) lanes_->runtime().delete_tensor(handle);
    throw std::runtime_error("lane " + std::to_string(lane) + " is full or closed; nothing was submitted");
  }

  // (token, outputs or (runtime's words, torch's words), started, finished); times in seconds. A batch's outputs are two
  // lists: of the whole ones (None where the members' are copies), and of each member's list.
  nb::object give(aoti::Completion& completion) const {
    nb::object result;
    if (completion.status == 0) {
      try {
        const nb::object outputs = tensors_.tensors_of(completion.outputs, lanes_->runtime());
        result = outputs;
        if (completion.members > 0) {
          nb::list both;
          both.append(outputs);
          std::vector<aoti::Handle> parts = std::exchange(completion.parts, {});  // from here on they are not ours
          both.append(tensors_.lists_of(parts, completion.members, lanes_->runtime()));
          result = both;
        }
      } catch (const std::exception& error) {  // this run's alone: the others that are drained with it go on
        completion.status = -1;
        completion.error = error.what();
        for (aoti::Handle part : completion.parts) {
          if (part != nullptr) lanes_->runtime().delete_tensor(part);
        }
      }
    }
    if (completion.status != 0) result = nb::make_tuple(text(completion.error), text(completion.cause));
    return nb::make_tuple(completion.token, result, static_cast<double>(completion.started) * 1e-9,
                          static_cast<double>(completion.finished) * 1e-9);
  }

  void refuse_in_child() const {
    if (forks != born_) {
      throw Forked("the process was forked after the lanes were made; make a new Scheduler in the child");
    }
  }

  int born_;
  aoti::Tensors tensors_;
  std::unique_ptr<aoti::Lanes> lanes_;
};

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Native lanes: threads that run compiled models and never touch Python.";
  pthread_atfork(nullptr, nullptr, [] { ++forks; });

  nb::exception<Forked>(module, "ForkedError", PyExc_RuntimeError);

  nb::class_<PyModel>(module, "Model")
      .def(
          "__init__",
          [](PyModel* self, std::uintptr_t run, std::uintptr_t container, std::size_t num_inputs,
             std::size_t num_outputs, std::uintptr_t last_error, std::uintptr_t proxy_executor) {
            if (run == 0) throw std::invalid_argument("run must be given");
            new (self) PyModel({at<aoti::RunFunction>(run), at<void*>(container), num_inputs, num_outputs,
                                at<aoti::LastErrorFunction>(last_error), at<void*>(proxy_executor)});
          },
          nb::kw_only(), nb::arg("run"), nb::arg("container"), nb::arg("num_inputs"), nb::arg("num_outputs"),
          nb::arg("last_error") = 0, nb::arg("proxy_executor") = 0);

  nb::class_<aoti::Tensors>(module, "Tensors")
      .def(
          "__init__",
          [](aoti::Tensors* self, nb::object type, nb::object to_capsules, nb::object from_capsules,
             std::uintptr_t new_handle, std::uintptr_t wrap) {
            new (self) aoti::Tensors(std::move(type), std::move(to_capsules), std::move(from_capsules),
                                     at<aoti::Tensors::NewHandle>(new_handle), at<aoti::Tensors::Wrap>(wrap));
          },
          nb::arg("type"), nb::arg("to_capsules"), nb::arg("from_capsules"), nb::kw_only(),
          nb::arg("new_handle") = 0, nb::arg("wrap") = 0);

  nb::class_<aoti::Shim>(module, "Shim")
      .def(
          "__init__",
          [](aoti::Shim* self, std::uintptr_t get_data_ptr, std::uintptr_t get_dim, std::uintptr_t get_sizes,
             std::uintptr_t get_strides, std::uintptr_t get_dtype, std::uintptr_t dtype_element_size,
             std::uintptr_t empty_strided, std::uintptr_t reinterpret_tensor, std::uintptr_t clone,
             std::uintptr_t delete_tensor, std::int32_t cpu) {
            new (self) aoti::Shim(shim(get_data_ptr, get_dim, get_sizes, get_strides, get_dtype, dtype_element_size,
                                       empty_strided, reinterpret_tensor, clone, delete_tensor, cpu));
          },
          nb::kw_only(), nb::arg("get_data_ptr"), nb::arg("get_dim"), nb::arg("get_sizes"), nb::arg("get_strides"),
          nb::arg("get_dtype"), nb::arg("dtype_element_size"), nb::arg("empty_strided"),
          nb::arg("reinterpret_tensor"), nb::arg("clone"), nb::arg("delete_tensor"), nb::arg("cpu"));

  nb::class_<PyPlan>(module, "Plan")
      .def(
          "__init__",
          [](PyPlan* self, const aoti::Shim& shim, const std::vector<PyInput>& inputs,
             const std::vector<PyOutput>& outputs, bool detach_rows) {
            new (self) PyPlan{make_plan(shim, inputs, outputs, detach_rows)};
          },
          nb::arg("shim"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("detach_rows"));

  nb::class_<PyDevice>(module, "Device")
      .def(
          "__init__",
          [](PyDevice* self, const aoti::Shim& shim, std::int32_t type, std::int32_t index, bool one_at_a_time,
             const std::map<std::string, std::uintptr_t>& functions, std::uintptr_t context) {
            new (self) PyDevice{make_device(shim, type, index, one_at_a_time, functions, context)};
          },
          nb::arg("shim"), nb::kw_only(), nb::arg("type"), nb::arg("index"), nb::arg("one_at_a_time"),
          nb::arg("functions"), nb::arg("context") = 0);

  nb::class_<PyStream>(module, "Stream")
      .def(
          "__init__",
          [](PyStream* self, const PyDevice& device, std::uintptr_t handle, std::uintptr_t fence, std::uintptr_t wait,
             std::uintptr_t argument, std::vector<bool> brought, bool home) {
            if ((fence == 0) == (wait == 0)) throw std::invalid_argument("fence and wait: one of both");
            const aoti::Fence how{at<aoti::FenceFunction>(fence), at<void (*)(void*)>(wait), at<void*>(argument)};
            new (self) PyStream{
                std::make_shared<aoti::Stream>(device.device, at<void*>(handle), how, std::move(brought), home)};
          },
          nb::arg("device"), nb::kw_only(), nb::arg("handle"), nb::arg("fence") = 0, nb::arg("wait") = 0,
          nb::arg("argument"), nb::arg("brought"), nb::arg("home"));

  nb::class_<PyGraph>(module, "Graph")
      .def(
          "__init__",
          [](PyGraph* self, const PyDevice& device, std::uintptr_t executable, const std::vector<std::uintptr_t>& inputs,
             const std::vector<std::uintptr_t>& outputs) {
            if (device.device->driver.launch_graph == nullptr) throw std::invalid_argument("the device launches no graphs");
            const auto handles = [](const std::vector<std::uintptr_t>& addresses) {
              std::vector<aoti::Handle> made;
              for (const std::uintptr_t address : addresses) made.push_back(at<aoti::Handle>(address));
              return made;
            };
            new (self) PyGraph{
                std::make_shared<aoti::Graph>(device.device, at<void*>(executable), handles(inputs), handles(outputs))};
          },
          nb::arg("device"), nb::kw_only(), nb::arg("executable"), nb::arg("inputs"), nb::arg("outputs"));

  module.def(
      "take_turn",
      [] {
        const WithoutGil without_gil;
        aoti::process_turn().lock();
      },
      "Wait for the process's turn on a device that takes one work at a time; it may be taken again by the same thread.");
  module.def(
      "come_home",
      [](bool others) {
        WithoutGil::come_home();
        if (others) nb::set_leak_warnings(false);
      },
      nb::arg("others"),
      "The interpreter ends, and the lanes are closed: wait for threads that are in here without the GIL. `others` says whether there are threads that it "
      "leaves behind: what they keep is no leak.");
  module.def("end_turn", [] { aoti::process_turn().unlock(); }, "End it, on the same thread.");

#ifdef AOTI_CONSTANT_MAPS
  nb::class_<PyConstantMap>(module, "ConstantMap")
      .def(nb::init<const std::vector<std::pair<std::string, std::uintptr_t>>&>(), nb::arg("pairs"))
      .def("address", &PyConstantMap::address, "Where the map lies, for as long as this lives.")
      .def("pairs", &PyConstantMap::pairs, "What it holds, in no order.");
#endif

  nb::class_<PyLanes>(module, "Lanes")
      .def(nb::init<std::vector<std::string>, std::vector<int>, int, aoti::Tensors, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::size_t>(),
           nb::arg("names"), nb::arg("affinities"), nb::arg("cores"), nb::arg("tensors"), nb::kw_only(), nb::arg("delete_tensor"),
           nb::arg("root_cause") = 0, nb::arg("get_threads") = 0, nb::arg("set_omp_threads") = 0,
           nb::arg("set_mkl_threads") = 0, nb::arg("new_handle") = 0, nb::arg("threads") = 0)
      .def("submit", &PyLanes::submit, nb::arg("lane"), nb::arg("token"), nb::arg("model"), nb::arg("inputs"),
           nb::arg("threads"), nb::arg("stream") = 0, nb::arg("fence") = 0, nb::arg("fence_argument") = 0,
           nb::arg("on").none() = nb::none(), nb::arg("graph").none() = nb::none(),
           "Hand a work to a lane. When it raises, nothing was taken.")
      .def("submit_batch", &PyLanes::submit_batch, nb::arg("lane"), nb::arg("token"), nb::arg("model"),
           nb::arg("plan"), nb::arg("members"), nb::arg("rows"), nb::arg("padded_rows"), nb::arg("slot"),
           nb::arg("threads"), nb::arg("stream") = 0, nb::arg("fence") = 0, nb::arg("fence_argument") = 0,
           nb::arg("on").none() = nb::none(), nb::arg("graph").none() = nb::none(),
           "As `submit`. What it returns must be kept until the work is drained: the lane reads the members' memory.")
      .def("drain", &PyLanes::drain, nb::arg("limit"),
           "At most so many completions, oldest first, as (token, outputs or error, started, finished).")
      .def("run_here", &PyLanes::run_here, nb::arg("model"), nb::arg("inputs"), nb::arg("threads"),
           nb::arg("on").none() = nb::none(), nb::arg("graph").none() = nb::none(),
           "Run on the calling thread, the GIL held unless it is on a device; a completion as of `drain`. The thread has its own counts again "
           "after.")
      .def("run_batch_here", &PyLanes::run_batch_here, nb::arg("model"), nb::arg("plan"), nb::arg("members"),
           nb::arg("rows"), nb::arg("padded_rows"), nb::arg("slot"), nb::arg("threads"),
           nb::arg("on").none() = nb::none(), nb::arg("graph").none() = nb::none(), "As `run_here`.")
      .def("poll", &PyLanes::poll, nb::arg("seconds"),
           "Spin until a completion waits, the GIL released, at most so long. Whether one does.")
      .def("ring", &PyLanes::ring, "Make the descriptor readable.")
      .def("fileno", &PyLanes::fileno)
      .def("count", &PyLanes::count)
      .def("close", &PyLanes::close, "Wait for what was submitted and join the threads.")
      .def("hang_up", &PyLanes::hang_up, "Close, and give the descriptor back: `fileno` is -1 from then on.");
}
