// The lanes as Python knows them: tensors come and go as tensors, all else as numbers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lane.hpp"
#include "py_types.hpp"
#include "tensors.hpp"

namespace aoti {

// A forked child has the lanes' memory and none of their threads.
struct Forked : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Counts forks from now on.
void watch_forks();

class PyLanes {
 public:
  PyLanes(std::vector<std::string> names, std::vector<int> affinities, int cores, Tensors tensors,
          std::uintptr_t delete_tensor, std::uintptr_t root_cause, std::uintptr_t get_threads,
          std::uintptr_t set_omp_threads, std::uintptr_t set_mkl_threads, std::uintptr_t new_handle,
          std::size_t threads, std::size_t open);
  // Waits for the submitted works, without the GIL: a work may run Python code that wants it.
  ~PyLanes();
  PyLanes(const PyLanes&) = delete;
  PyLanes& operator=(const PyLanes&) = delete;

  void submit(std::size_t lane, std::uint64_t token, const PyModel& model, nanobind::handle inputs,
              int threads, const PyStream* on, const PyGraph* graph, const PyArrival* after,
              const std::optional<Consumers>& consumers);
  nanobind::object submit_batch(std::size_t lane, std::uint64_t token, PyModel& model,
                                const PyPlan& plan, nanobind::handle members, nanobind::handle rows,
                                std::int64_t padded_rows, std::size_t slot, int threads,
                                const PyStream* on, const PyGraph* graph,
                                const std::optional<Consumers>& consumers);
  nanobind::list drain(std::size_t limit);
  nanobind::object run_here(const PyModel& model, nanobind::handle inputs, int threads,
                            const PyStream* on, const PyGraph* graph, const PyArrival* after,
                            const std::optional<Consumers>& consumers);
  nanobind::object run_batch_here(PyModel& model, const PyPlan& plan, nanobind::handle members,
                                  nanobind::handle rows, std::int64_t padded_rows, std::size_t slot,
                                  int threads, const PyStream* on, const PyGraph* graph,
                                  const std::optional<Consumers>& consumers);
  bool poll(double seconds);
  void wake() { lanes_->wake(); }
  [[nodiscard]] int fileno() const { return lanes_->descriptor(); }
  [[nodiscard]] std::size_t count() const { return lanes_->count(); }
  void grow(std::size_t count);
  void close();
  void hang_up();

 private:
  [[nodiscard]] Work make_work(const PyModel& model, nanobind::handle inputs, int threads) const;
  // Makes a second handle of each input, so that a run without the GIL never frees the last one.
  // Throws std::runtime_error.
  void keep_inputs(Work& work) const;
  // Returns the batch, and the tensors that must be kept until it is over.
  [[nodiscard]] std::pair<Work, nanobind::object> make_batch(PyModel& model, const PyPlan& plan,
                                                             nanobind::handle members,
                                                             nanobind::handle rows,
                                                             std::int64_t padded_rows,
                                                             std::size_t slot, int threads) const;
  // Sets the stream that the work runs on, the graph that is launched there instead of the model,
  // what the run comes after, and the streams that use its outputs.
  static void attach_stream(Work& work, const PyStream* on, const PyGraph* graph,
                            const PyArrival* after, const std::optional<Consumers>& consumers);
  void hand_over(std::size_t lane, std::uint64_t token, Work& work);
  [[nodiscard]] nanobind::object finish_here(Work&& work) const;
  // Returns (token, outputs or (runtime's words, torch's words), started, finished); times in
  // seconds. A batch's outputs are two lists: the whole outputs (None where the members' are
  // copies), and each member's list.
  [[nodiscard]] nanobind::object to_python(Completion& completion) const;
  void refuse_in_child() const;

  int born_;
  Tensors tensors_;
  std::unique_ptr<Lanes> lanes_;
};

}  // namespace aoti
