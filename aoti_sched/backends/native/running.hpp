// A work, and how it is run on the calling thread: on a CPU at once, on a device from its launch to its end.
//
// Nothing here knows torch or Python: models, their errors and tensors arrive as function pointers and handles.
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
using RunFunction = std::int32_t (*)(void* container, Handle* inputs, std::size_t num_inputs, Handle* outputs,
                                     std::size_t num_outputs, void* stream, void* proxy_executor);
using LastErrorFunction = std::int32_t (*)(const char** text);
// What lanes need of torch. Each may be null but `delete_tensor`.
struct Runtime {
  std::int32_t (*delete_tensor)(Handle) = nullptr;
  const char* (*root_cause)() = nullptr;  // torch_exception_get_what_without_backtrace
  // The calling thread's own intra-op threads. Torch sets a thread's count when it is first asked for it, so it is
  // asked before a count is set, or it would do so later over ours.
  int (*get_threads)() = nullptr;
  void (*set_omp_threads)(int) = nullptr;
  int (*set_mkl_threads)(int) = nullptr;  // returns what it was
  // Makes another handle of a tensor, where a model gives one tensor at several outputs.
  std::int32_t (*new_handle)(Handle tensor, Handle* made) = nullptr;
};

// How one model is run; shared by all its works.
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
  const Model* model = nullptr;
  std::vector<Handle> inputs;  // owned by the work until the model steals them; those of a batch are made by its run
  std::unique_ptr<Batch> batch;
  int threads = 1;             // intra-op threads of the run
  void* stream = nullptr;
  FenceFunction fence = nullptr;
  void* fence_argument = nullptr;
  std::shared_ptr<Stream> on;  // a slot's stream, in the place of the three above
  std::shared_ptr<const Graph> graph;  // launched there in the place of the model
};

struct Completion {
  std::uint64_t token = 0;
  std::int32_t status = 0;
  std::vector<Handle> outputs;  // owned by whoever drains, each handle once; null where the model left one out
  // Of a batch: each member's part of each output, member after member, owned as the outputs are. The outputs are there
  // beside them, unless the parts are copies.
  std::vector<Handle> parts;
  std::size_t members = 0;  // 0: no batch
  std::string error;  // the runtime's own words for a failure
  std::string cause;  // torch's, which may be about an earlier failure of the same thread
  std::int64_t started = 0;   // nanoseconds of the monotonic clock
  std::int64_t finished = 0;
};

// A work from its begin to its end, on the calling thread with the intra-op threads it has. On a device there is time between the two.
// Every exception becomes a status; handles are never lost.
class Running {
 public:
  Running(const Runtime& runtime, Work&& work);

  // The device has it now, and can be asked whether it is done. Until `end`, the thread may do other things.
  bool can_be_left() const { return on_ && work_.on->can_be_asked(); }
  void leave() { on_->leave(); }
  bool ready();

  // Waits for the device.
  Completion end();

 private:
  void begin();

  const Runtime& runtime_;
  Work work_;
  const Model& model_;
  Completion completion_;
  std::vector<Alias> aliases_;  // the outputs that are null until `end`
  std::optional<Stream::Run> on_;  // from when it is begun until the device is done
};

// Runs a work on the calling thread. Every exception becomes a status; handles are never lost. The thread's intra-op
// threads are the work's during the run, and afterwards what they were.
Completion run_here(const Runtime& runtime, Work& work);

// Gives up handles that are there.
void free_handles(const Runtime& runtime, std::vector<Handle>& handles);

}  // namespace aoti
