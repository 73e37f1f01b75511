#include "py_lanes.hpp"

#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>

#include <pthread.h>

#include "gil.hpp"

namespace nb = nanobind;

namespace aoti {

namespace {

std::atomic<int> forks{0};

nb::object text(const std::string& bytes) {
  return nb::steal(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

Runtime make_runtime(std::uintptr_t delete_tensor, std::uintptr_t root_cause,
                     std::uintptr_t get_threads, std::uintptr_t set_omp_threads,
                     std::uintptr_t set_mkl_threads, std::uintptr_t new_handle) {
  if (delete_tensor == 0) throw std::invalid_argument("delete_tensor must be given");
  Runtime runtime;
  runtime.delete_tensor = at<DeleteFunction>(delete_tensor);
  runtime.root_cause = at<const char* (*)()>(root_cause);
  runtime.get_threads = at<int (*)()>(get_threads);
  runtime.set_omp_threads = at<void (*)(int)>(set_omp_threads);
  runtime.set_mkl_threads = at<int (*)(int)>(set_mkl_threads);
  runtime.new_handle = at<std::int32_t (*)(BorrowedHandle, Handle*)>(new_handle);
  return runtime;
}

}  // namespace

void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { ++forks; });
}

PyLanes::PyLanes(std::vector<std::string> names, std::vector<int> affinities, int cores,
                 Tensors tensors, std::uintptr_t delete_tensor, std::uintptr_t root_cause,
                 std::uintptr_t get_threads, std::uintptr_t set_omp_threads,
                 std::uintptr_t set_mkl_threads, std::uintptr_t new_handle, std::size_t threads,
                 std::size_t open)
    : born_(forks),
      tensors_(std::move(tensors)),
      lanes_(std::make_unique<Lanes>(make_runtime(delete_tensor, root_cause, get_threads,
                                                  set_omp_threads, set_mkl_threads, new_handle),
                                     std::move(names), std::move(affinities), cores, threads,
                                     open)) {}

PyLanes::~PyLanes() {
  // In a forked child the threads are missing, and joining them would never end: the memory is
  // left.
  if (forks != born_) static_cast<void>(lanes_.release());
  close();
}

void PyLanes::submit(std::size_t lane, std::uint64_t token, const PyModel& model, nb::handle inputs,
                     int threads, const PyStream* on, const PyGraph* graph, const PyArrival* after,
                     const std::optional<Consumers>& consumers) {
  if (lane >= lanes_->count()) throw nb::index_error("no such lane");
  Work work = make_work(model, inputs, threads);
  keep_inputs(work);
  attach_stream(work, on, graph, after, consumers);
  hand_over(lane, token, work);
}

nb::object PyLanes::submit_batch(std::size_t lane, std::uint64_t token, PyModel& model,
                                 const PyPlan& plan, nb::handle members, nb::handle rows,
                                 std::int64_t padded_rows, std::size_t slot, int threads,
                                 const PyStream* on, const PyGraph* graph,
                                 const std::optional<Consumers>& consumers) {
  if (lane >= lanes_->count()) throw nb::index_error("no such lane");
  auto [work, tensors] = make_batch(model, plan, members, rows, padded_rows, slot, threads);
  attach_stream(work, on, graph, nullptr, consumers);
  hand_over(lane, token, work);
  return tensors;
}

nb::list PyLanes::drain(std::size_t limit) {
  refuse_in_child();
  nb::list taken;
  std::list<Completion> drained = lanes_->drain(limit);
  while (!drained.empty()) {
    try {
      taken.append(to_python(drained.front()));
    } catch (...) {  // no memory: this run has failed, and the others are drained later
      Completion& failed = drained.front();
      failed.status = -1;
      failed.error = "out of memory";
      failed.outputs.reset();
      failed.parts.reset();
      lanes_->put_back(std::move(drained));
      if (taken.size() == 0) throw;
      break;
    }
    drained.pop_front();
  }
  return taken;
}

nb::object PyLanes::run_here(const PyModel& model, nb::handle inputs, int threads,
                             const PyStream* on, const PyGraph* graph, const PyArrival* after,
                             const std::optional<Consumers>& consumers) {
  Work work = make_work(model, inputs, threads);
  if (on != nullptr) keep_inputs(work);
  attach_stream(work, on, graph, after, consumers);
  return finish_here(std::move(work));
}

nb::object PyLanes::run_batch_here(PyModel& model, const PyPlan& plan, nb::handle members,
                                   nb::handle rows, std::int64_t padded_rows, std::size_t slot,
                                   int threads, const PyStream* on, const PyGraph* graph,
                                   const std::optional<Consumers>& consumers) {
  auto [work, tensors] = make_batch(model, plan, members, rows, padded_rows, slot, threads);
  attach_stream(work, on, graph, nullptr, consumers);
  return finish_here(std::move(work));
}

bool PyLanes::poll(double seconds) {
  refuse_in_child();
  const ReleasedGil released;
  return lanes_->poll(std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9)));
}

void PyLanes::grow(std::size_t count) {
  refuse_in_child();
  const ReleasedGil released;
  lanes_->grow(count);
}

void PyLanes::close() {
  if (forks != born_) return;
  const ReleasedGil released;
  lanes_->close();
}

void PyLanes::hang_up() {
  if (forks != born_) return;
  const ReleasedGil released;
  lanes_->hang_up();
}

Work PyLanes::make_work(const PyModel& model, nb::handle inputs, int threads) const {
  refuse_in_child();
  Work work;
  work.model = model.model;
  work.inputs =
      tensors_.from_python(inputs, model.model->num_inputs, lanes_->runtime().delete_tensor);
  work.threads = threads;
  return work;
}

void PyLanes::keep_inputs(Work& work) const {
  const Runtime& runtime = lanes_->runtime();
  if (runtime.new_handle == nullptr) return;
  work.kept = OwnedHandles(runtime.delete_tensor, work.inputs.size());
  for (std::size_t i = 0; i < work.inputs.size(); ++i) {
    if (runtime.new_handle(work.inputs[i], work.kept.receive(i)) != 0)
      throw std::runtime_error("torch made no handle for an input");
  }
}

std::pair<Work, nb::object> PyLanes::make_batch(PyModel& model, const PyPlan& plan,
                                                nb::handle members, nb::handle rows,
                                                std::int64_t padded_rows, std::size_t slot,
                                                int threads) const {
  refuse_in_child();
  if (plan.plan->inputs.size() != model.model->num_inputs ||
      plan.plan->outputs.size() != model.model->num_outputs) {
    throw std::invalid_argument(
        "the plan is not this model's: it has other numbers of inputs or outputs");
  }
  std::vector<BorrowedHandle> borrowed;
  nb::object tensors = tensors_.borrow(members, model.model->num_inputs, borrowed);
  Work work;
  work.model = model.model;
  work.threads = threads;
  work.batch = std::make_unique<Batch>(plan.plan, model.staging(slot), std::move(borrowed),
                                       nb::cast<std::vector<std::int64_t>>(rows), padded_rows);
  return {std::move(work), std::move(tensors)};
}

void PyLanes::attach_stream(Work& work, const PyStream* on, const PyGraph* graph,
                            const PyArrival* after, const std::optional<Consumers>& consumers) {
  if (on == nullptr && (after != nullptr || consumers))
    throw std::invalid_argument("after and consumers: only with a stream");
  if (on != nullptr) work.on = on->stream;
  if (after != nullptr) work.after = after->arrival;
  if (consumers) {
    const std::size_t members = work.batch == nullptr ? 1 : work.batch->rows.size();
    if (consumers->size() != members) throw std::invalid_argument("consumers: one for each member");
    if (on->stream->device().record_use == nullptr)
      throw std::invalid_argument("the device records no uses");
    work.consumers = *consumers;
  }
  if (graph == nullptr) return;
  if (on == nullptr || graph->graph->inputs.size() != work.model->num_inputs ||
      graph->graph->outputs.size() != work.model->num_outputs) {
    throw std::invalid_argument("the graph is not this model's, or no stream was given for it");
  }
  work.graph = graph->graph;
}

void PyLanes::hand_over(std::size_t lane, std::uint64_t token, Work& work) {
  work.token = token;
  if (lanes_->submit(lane, work)) return;
  throw std::runtime_error("lane " + std::to_string(lane) +
                           " is full or closed; nothing was submitted");
}

nb::object PyLanes::finish_here(Work&& work) const {
  Completion completion;
  if (work.on == nullptr) {
    completion = aoti::run_here(lanes_->runtime(), std::move(work));
  } else {
    const ReleasedGil released;  // the run waits for a device, which Python may use too
    completion = aoti::run_here(lanes_->runtime(), std::move(work));
  }
  return to_python(completion);
}

nb::object PyLanes::to_python(Completion& completion) const {
  nb::object result;
  if (completion.status == 0) {
    try {
      result = tensors_.to_python(std::move(completion.outputs));
      if (completion.members > 0) {
        nb::list both;
        both.append(result);
        both.append(tensors_.to_lists(std::move(completion.parts), completion.members));
        result = both;
      }
    } catch (const std::exception& error) {  // fails this run; the others of the drain go on
      completion.status = -1;
      completion.error = error.what();
      completion.parts.reset();
    }
  }
  if (completion.status != 0) {
    result = nb::make_tuple(text(completion.error), text(completion.cause));
  }
  return nb::make_tuple(completion.token, result, static_cast<double>(completion.started) * 1e-9,
                        static_cast<double>(completion.finished) * 1e-9);
}

void PyLanes::refuse_in_child() const {
  if (forks == born_) return;
  throw Forked(
      "the process was forked after the lanes were made; make a new Scheduler in the child");
}

}  // namespace aoti
