// Lanes: native threads that run compiled models, one work at a time each, and never touch Python.
//
// Nothing here knows torch or Python. Models, their errors and tensors arrive as function pointers and
// handles, so one build serves every torch, and the tests drive it with a small C library.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
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
  std::vector<Handle> outputs;  // owned by whoever drains; null where the model left one out
  // Of a batch: each member's part of each output, member after member, owned as the outputs are. The outputs are there
  // beside them, unless the parts are copies.
  std::vector<Handle> parts;
  std::size_t members = 0;  // 0: no batch
  std::string error;  // the runtime's own words for a failure
  std::string cause;  // torch's, which may be about an earlier failure of the same thread
  std::int64_t started = 0;   // nanoseconds of the monotonic clock
  std::int64_t finished = 0;
};

// Runs a work on the calling thread. Every exception becomes a status; handles are never lost. The thread's intra-op
// threads are the work's during the run, and afterwards what they were.
Completion run_here(const Runtime& runtime, Work& work);

// Makes a descriptor readable while completions wait.
class Bell {
 public:
  Bell();
  ~Bell();
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  void ring();
  void hush();
  int descriptor() const { return read_end_; }

 private:
  int read_end_ = -1;
  int write_end_ = -1;
};

class Lanes {
 public:
  static constexpr std::size_t kDepth = 2;  // one running, one next

  // One lane for each name; `affinities` is a core for each, or negative. Each has a thread of its name, unless there shall be fewer `threads`:
  // then each of those serves several lanes, which is for devices: it launches what they have, and looks again and again what is done. Throws
  // std::system_error.
  Lanes(Runtime runtime, std::vector<std::string> names, std::vector<int> affinities, int cores, std::size_t threads = 0);
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  std::size_t count() const { return lanes_.size(); }
  int descriptor() const { return bell_.descriptor(); }
  const Runtime& runtime() const { return runtime_; }
  void ring() { bell_.ring(); }

  // False when the lane holds two works already, or is closed; the work is then untouched.
  bool submit(std::size_t lane, Work& work);

  // At most `limit` completions, oldest first; the bell stays rung while there are more.
  std::vector<Completion> drain(std::size_t limit);

  // Spins until a completion waits, or for so long at most; says whether one does. What comes meanwhile does not ring the bell: it is
  // for the caller to drain. One thread at a time.
  bool poll(std::chrono::nanoseconds limit);

  // Waits for what was submitted, then joins the threads. Closing twice does nothing.
  void close();

 private:
  struct Lane;
  struct Thread;
  void serve(Thread& thread);
  // A lane whose work can begin; null when all is done and the lanes are closing.
  Lane* wait_for_work(Thread& thread);
  void finish(Completion&& completion);

  Runtime runtime_;
  int cores_;
  std::atomic<int> awake_{0};  // threads that run or spin
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<std::unique_ptr<Thread>> threads_;  // each lane's is that of its number, and all beyond the last again
  std::mutex done_mutex_;
  std::vector<Completion> done_;  // guarded by done_mutex_
  bool rung_ = false;             // guarded by done_mutex_
  bool polled_ = false;           // guarded by done_mutex_: somebody looks, and needs no bell
  bool silent_ = false;           // guarded by done_mutex_: what was found by looking rang no bell
  std::atomic<std::size_t> finished_{0};  // counts completions, for the loop that polls
  Bell bell_;
  std::mutex close_mutex_;
  bool closed_ = false;
};

}  // namespace aoti
