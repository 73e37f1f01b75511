// The Python face of the lanes. Tensors come and go as torch's unnamed capsules; everything else is numbers.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include <pthread.h>

#include "lane.hpp"

namespace nb = nanobind;

namespace {

// A forked child has the lanes' memory and none of their threads.
std::atomic<int> forks{0};

struct PyModel {
  aoti::Model model;
};

template <typename Function>
Function at(std::uintptr_t address) {
  return reinterpret_cast<Function>(address);
}

std::vector<aoti::Handle> take(nb::list capsules) {
  std::vector<aoti::Handle> handles;
  handles.reserve(capsules.size());
  for (nb::handle capsule : capsules) {
    void* handle = PyCapsule_GetPointer(capsule.ptr(), nullptr);
    if (handle == nullptr) throw nb::python_error();
    handles.push_back(handle);
  }
  return handles;
}

nb::object text(const std::string& bytes) {
  return nb::steal(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

// (token, outputs or None, None or (runtime's words, torch's words), started, finished); times in seconds.
nb::object give(aoti::Completion& completion) {
  nb::object outputs = nb::none();
  nb::object error = nb::none();
  if (completion.status == 0) {
    nb::list capsules;
    for (aoti::Handle handle : completion.outputs) {
      capsules.append(handle == nullptr ? nb::none() : nb::steal(PyCapsule_New(handle, nullptr, nullptr)));
    }
    outputs = std::move(capsules);
  } else {
    error = nb::make_tuple(text(completion.error), text(completion.cause));
  }
  return nb::make_tuple(completion.token, outputs, error, static_cast<double>(completion.started) * 1e-9,
                        static_cast<double>(completion.finished) * 1e-9);
}

class PyLanes {
 public:
  PyLanes(std::vector<std::string> names, std::vector<int> affinities, int cores, std::uintptr_t delete_tensor,
          std::uintptr_t root_cause, std::uintptr_t init_threads, std::uintptr_t set_omp_threads,
          std::uintptr_t set_mkl_threads)
      : born_(forks),
        lanes_(std::make_unique<aoti::Lanes>(
            runtime(delete_tensor, root_cause, init_threads, set_omp_threads, set_mkl_threads), std::move(names),
            std::move(affinities), cores)) {}

  ~PyLanes() {
    // In a forked child the threads are missing, and joining them would never end: let the memory be.
    if (forks != born_) static_cast<void>(lanes_.release());
  }
  PyLanes(const PyLanes&) = delete;
  PyLanes& operator=(const PyLanes&) = delete;

  void submit(std::size_t lane, std::uint64_t token, const PyModel& model, nb::list inputs, std::uintptr_t stream,
              std::uintptr_t fence, std::uintptr_t fence_argument) {
    refuse_in_child();
    if (lane >= lanes_->count()) throw nb::index_error("no such lane");
    aoti::Work work;
    work.token = token;
    work.model = &model.model;
    work.inputs = take(inputs);
    work.stream = at<void*>(stream);
    work.fence = at<aoti::FenceFunction>(fence);
    work.fence_argument = at<void*>(fence_argument);
    check_count(model, work);
    if (!lanes_->submit(lane, work)) throw std::runtime_error("the lane is full or closed; nothing was submitted");
  }

  nb::list drain(std::size_t limit) {
    refuse_in_child();
    nb::list taken;
    for (aoti::Completion& completion : lanes_->drain(limit)) taken.append(give(completion));
    return taken;
  }

  nb::object run_here(const PyModel& model, nb::list inputs) {
    refuse_in_child();
    aoti::Work work;
    work.model = &model.model;
    work.inputs = take(inputs);
    check_count(model, work);
    aoti::Completion completion = aoti::run_work(lanes_->runtime(), work);
    return give(completion);
  }

  void ring() { lanes_->ring(); }
  int fileno() const { return lanes_->descriptor(); }
  std::size_t count() const { return lanes_->count(); }

  void close() {
    if (forks != born_) return;
    nb::gil_scoped_release released;
    lanes_->close();
  }

 private:
  static aoti::Runtime runtime(std::uintptr_t delete_tensor, std::uintptr_t root_cause, std::uintptr_t init_threads,
                               std::uintptr_t set_omp_threads, std::uintptr_t set_mkl_threads) {
    if (delete_tensor == 0) throw std::invalid_argument("delete_tensor must be given");
    aoti::Runtime runtime;
    runtime.delete_tensor = at<std::int32_t (*)(aoti::Handle)>(delete_tensor);
    runtime.root_cause = at<const char* (*)()>(root_cause);
    runtime.init_threads = at<int (*)()>(init_threads);
    runtime.set_omp_threads = at<void (*)(int)>(set_omp_threads);
    runtime.set_mkl_threads = at<int (*)(int)>(set_mkl_threads);
    return runtime;
  }

  static void check_count(const PyModel& model, const aoti::Work& work) {
    // The runtime throws across its C boundary for this; here it is still the caller's own mistake.
    if (work.inputs.size() != model.model.num_inputs) throw std::invalid_argument("wrong number of inputs");
  }

  void refuse_in_child() const {
    if (forks != born_) {
      throw std::runtime_error("the process was forked after the lanes were made; make a new Scheduler in the child");
    }
  }

  int born_;
  std::unique_ptr<aoti::Lanes> lanes_;
};

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Native lanes: threads that run compiled models and never touch Python.";
  pthread_atfork(nullptr, nullptr, [] { ++forks; });

  nb::class_<PyModel>(module, "Model")
      .def(
          "__init__",
          [](PyModel* self, std::uintptr_t run, std::uintptr_t container, std::size_t num_inputs,
             std::size_t num_outputs, std::uintptr_t last_error, std::uintptr_t proxy_executor, int threads) {
            if (run == 0) throw std::invalid_argument("run must be given");
            new (self) PyModel{{at<aoti::RunFunction>(run), at<void*>(container), num_inputs, num_outputs,
                                at<aoti::LastErrorFunction>(last_error), at<void*>(proxy_executor), threads}};
          },
          nb::kw_only(), nb::arg("run"), nb::arg("container"), nb::arg("num_inputs"), nb::arg("num_outputs"),
          nb::arg("last_error") = 0, nb::arg("proxy_executor") = 0, nb::arg("threads") = 1);

  nb::class_<PyLanes>(module, "Lanes")
      .def(nb::init<std::vector<std::string>, std::vector<int>, int, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t, std::uintptr_t>(),
           nb::arg("names"), nb::arg("affinities"), nb::arg("cores"), nb::kw_only(), nb::arg("delete_tensor"),
           nb::arg("root_cause") = 0, nb::arg("init_threads") = 0, nb::arg("set_omp_threads") = 0,
           nb::arg("set_mkl_threads") = 0)
      .def("submit", &PyLanes::submit, nb::arg("lane"), nb::arg("token"), nb::arg("model"), nb::arg("inputs"),
           nb::arg("stream") = 0, nb::arg("fence") = 0, nb::arg("fence_argument") = 0,
           "Hand a work to a lane; the inputs' handles are taken. When it raises, they are still the caller's to free.")
      .def("drain", &PyLanes::drain, nb::arg("limit"),
           "Completions as (token, outputs, error, started, finished); outputs must be turned into tensors.")
      .def("run_here", &PyLanes::run_here, nb::arg("model"), nb::arg("inputs"),
           "Run on the calling thread, the GIL held; a completion as of `drain`.")
      .def("ring", &PyLanes::ring, "Make the descriptor readable.")
      .def("fileno", &PyLanes::fileno)
      .def("count", &PyLanes::count)
      .def("close", &PyLanes::close, "Wait for what was submitted and join the threads.");
}
