// A work, and its run on the calling thread: on a CPU at once, on a device from its launch to its
// end.
//
// Nothing here knows torch or Python: models, their errors and tensors arrive as function pointers
// and handles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "batch.hpp"
#include "handle.hpp"
#include "stream.hpp"

namespace aoti {

// The C ABI of a model: AOTInductorModelContainerRun and AOTInductorGetLastError.
using RunFunction = std::int32_t (*)(void* container, Handle* inputs, std::size_t num_inputs,
                                     Handle* outputs, std::size_t num_outputs, void* stream,
                                     void* proxy_executor);
using LastErrorFunction = std::int32_t (*)(const char** text);

// Torch's functions for lanes. Only `delete_tensor` is required.
struct Runtime {
  DeleteFunction delete_tensor = nullptr;
  const char* (*root_cause)() = nullptr;  // torch_exception_get_what_without_backtrace
  // Returns the calling thread's own intra-op threads. The first call sets the thread's count, so
  // it comes before the lane sets one.
  int (*get_threads)() = nullptr;
  void (*set_omp_threads)(int) = nullptr;
  int (*set_mkl_threads)(int) = nullptr;  // returns the count before
  // Makes another handle of a tensor, where a model gives one tensor at several outputs.
  std::int32_t (*new_handle)(BorrowedHandle tensor, Handle* made) = nullptr;
};

// How one model is run. Each work shares its model.
struct Model {
  RunFunction run = nullptr;
  void* container = nullptr;
  std::size_t num_inputs = 0;
  std::size_t num_outputs = 0;
  LastErrorFunction last_error = nullptr;
  void* proxy_executor = nullptr;
};

struct Work {
  std::uint64_t token = 0;
  std::shared_ptr<const Model> model;
  OwnedHandles inputs;  // the model steals some of them; a batch's are made by its run
  // A second handle of each input, which becomes `Completion::inputs`. Empty for a run on the
  // thread that has the GIL.
  OwnedHandles kept;
  std::unique_ptr<Batch> batch;
  int threads = 1;                       // intra-op threads of the run
  std::shared_ptr<Stream> on;            // a slot's stream on a device; null for a CPU
  std::shared_ptr<const Graph> graph;    // launched on the stream instead of the model
  std::shared_ptr<const Arrival> after;  // what the run comes after; null where nothing is awaited
  // Torch's id of the stream that uses the outputs next, if any, for each member of a batch. Empty
  // where their use is not recorded here.
  std::vector<std::optional<std::int64_t>> consumers;
};

struct Completion {
  std::uint64_t token = 0;
  std::int32_t status = 0;
  OwnedHandles outputs;  // null where the model left an output out
  // The second handles of the inputs. Torch acquires the GIL to free the last handle of a Python
  // tensor. The thread that drains the completion has the GIL, so that thread frees these.
  OwnedHandles inputs;
  // Of a batch: each member's part of each output, member after member. The outputs are there
  // beside them, unless the parts are copies.
  OwnedHandles parts;
  std::size_t members = 0;  // 0: no batch
  std::string error;        // the runtime's own words for a failure
  std::string cause;  // torch's words, which may be about an earlier failure of the same thread
  std::int64_t started = 0;  // nanoseconds of the monotonic clock
  std::int64_t finished = 0;
};

// One run of a work on the calling thread, with the intra-op threads that the thread has. Every
// exception becomes a status.
class Run {
 public:
  Run(const Runtime& runtime, Work&& work) noexcept : runtime_(runtime), work_(std::move(work)) {}

  // Runs the model. On a device it only launches the model; on a CPU it blocks for the whole run.
  void launch() noexcept;

  // Whether the device has the work, and can be polled for its end. Until `finish`, the thread may
  // serve other runs.
  [[nodiscard]] bool can_detach() const { return stream_run_ && work_.on->can_poll(); }
  // Separates the thread from the run until `finish`.
  void detach() {
    if (stream_run_) stream_run_->detach();
  }
  // Returns whether `finish` would not wait.
  [[nodiscard]] bool ready() noexcept;

  // Waits for the device and returns the outcome. Follows `launch`, once.
  [[nodiscard]] Completion finish() noexcept;

 private:
  void launch_on_stream();
  void run_model() noexcept;
  void record_uses() const;

  const Runtime& runtime_;
  Work work_;
  Completion completion_;
  std::vector<Alias> aliases_;           // the outputs that are null until `finish`
  std::optional<StreamRun> stream_run_;  // from the launch until the device is done
};

// Runs a work on the calling thread. The thread's intra-op threads are the work's during the run,
// and its own again afterwards.
[[nodiscard]] Completion run_here(const Runtime& runtime, Work&& work);

}  // namespace aoti
