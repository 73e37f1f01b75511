// Streams: what surrounds a run whose work is done by a device and not by the calling thread.
//
// As the lanes, this knows neither torch nor Python nor a device's library: their functions arrive as pointers. Where a
// driver has its copies (CUDA), they are asynchronous and go through pinned memory; elsewhere torch copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "batch.hpp"
#include "handle.hpp"

namespace aoti {

// Waits until the stream's device work is complete; 0 is success.
using FenceFunction = std::int32_t (*)(void* argument);

// Of CUDA's driver, or null where torch serves: cuCtxGetCurrent, cuCtxSetCurrent, cuStreamQuery, cuMemcpyHtoDAsync, cuMemcpyDtoHAsync, cuMemAllocHost,
// cuMemFreeHost, cuGraphLaunch, cuGetErrorString.
struct Driver {
  void* context = nullptr;
  std::int32_t (*get_context)(void** context) = nullptr;
  std::int32_t (*set_context)(void* context) = nullptr;
  std::int32_t (*query)(void* stream) = nullptr;
  std::int32_t (*copy_in)(std::uint64_t to, const void* from, std::size_t bytes, void* stream) = nullptr;
  std::int32_t (*copy_out)(void* to, std::uint64_t from, std::size_t bytes, void* stream) = nullptr;
  std::int32_t (*allocate_host)(void** made, std::size_t bytes) = nullptr;
  std::int32_t (*free_host)(void* memory) = nullptr;
  std::int32_t (*launch_graph)(void* executable, void* stream) = nullptr;
  std::int32_t (*explain)(std::int32_t error, const char** words) = nullptr;
};

struct Device {
  Shim shim;
  std::int32_t (*new_handle)(Handle tensor, Handle* made) = nullptr;
  std::int32_t (*get_device_type)(Handle tensor, std::int32_t* type) = nullptr;
  std::int32_t (*copy)(Handle to, Handle from, std::int32_t non_blocking) = nullptr;
  // Makes a stream the calling thread's current one: memory made meanwhile is of its pool. Null where there is no such thing.
  std::int32_t (*guard)(void* stream, std::int32_t index, void** made) = nullptr;
  std::int32_t (*unguard)(void* guard) = nullptr;
  std::int32_t type = 0;  // torch's number for this kind of device
  std::int32_t index = 0;
  bool one_at_a_time = false;  // of all works in the process
  Driver driver;
};

// Throws std::runtime_error, with the driver's words, unless the status is 0.
void demand(const Driver& driver, std::int32_t status, const std::string& what);

// The device's context is the calling thread's current one, and afterwards what it was before: it may be a user's thread.
class InContext {
 public:
  explicit InContext(const Driver& driver);
  ~InContext();
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  const Driver& driver_;
  void* before_ = nullptr;
};

// Held by whoever works on a device that takes one work of the process at a time.
std::recursive_mutex& process_turn();

// How a slot waits for its device: `fence`, or `wait`, which throws; each is given the argument.
struct Fence {
  FenceFunction fence = nullptr;
  void (*wait)(void* argument) = nullptr;
  void* argument = nullptr;
};

// Pinned memory that is kept for the next work; plain where the driver has none.
class Pinned {
 public:
  explicit Pinned(const Driver& driver) : driver_(driver) {}
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  // At least so many bytes; what was there before is gone, so no copy of it may be going on. Throws std::runtime_error.
  char* of(std::size_t bytes);

 private:
  const Driver& driver_;
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

// A run of a model that was recorded, and is launched as one thing. It reads its own inputs and writes its own outputs, which are
// kept with it, null where the model left one out and where an output is an alias.
struct Graph {
  // Takes the handles. One tensor at several outputs has one handle, which is given at each of them.
  Graph(std::shared_ptr<const Device> device, void* executable, std::vector<Handle> inputs, std::vector<Handle> outputs);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  std::shared_ptr<const Device> device;
  void* executable;
  std::vector<Handle> inputs;
  std::vector<Handle> outputs;
  std::vector<Alias> aliases;
};

// A slot's stream. One work at a time: a `Run` on it lives from before the inputs are brought until the device is done. One thread has
// it from beginning to end.
class Stream {
 public:
  // `brought` says of each input whether it shall lie on the device: it is copied over when it does not. Where outputs are
  // wanted `home`, they come to the host's memory.
  Stream(std::shared_ptr<const Device> device, void* handle, Fence fence, std::vector<bool> brought, bool home);

  void* handle() const { return handle_; }
  // Whether a thread may leave a run to the device and ask later whether it is done.
  bool can_be_asked() const { return device_->driver.query != nullptr && !device_->one_at_a_time; }

  class Run {
   public:
    // Waits for the process's turn where there is one, and makes the stream the thread's current one.
    explicit Run(Stream& stream);
    ~Run();
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    // Puts a device's tensor in the place of each input that shall be brought, and holds all inputs: the model lets go of
    // them when it has launched, and not when the device is done.
    void bring(std::vector<Handle>& inputs) { bring(inputs, nullptr); }
    // In the place of the model's run: copies the inputs to the graph's, launches it, and copies its outputs, or lets them come home.
    void launch(const Graph& graph, std::vector<Handle>& inputs, std::vector<Handle>& outputs);
    // Lets the outputs come home behind the run.
    void send_home(const std::vector<Handle>& outputs);
    // What this thread does next has nothing to do with this run, until it fences.
    void leave();
    // Whether the device is done with it, or has failed: then the fence does not wait. Where nobody can ask, it is never known.
    bool ready() const;
    // Waits for the device. Must be called, whatever failed before: what was launched may still use what is freed next.
    void fence();
    // Puts the tensors that came home in the outputs' places. After the fence.
    void land(std::vector<Handle>& outputs);

   private:
    struct Home {
      std::size_t output;
      Handle tensor;
      void* to;
      const char* from;  // in pinned memory; null when it is there already
      std::size_t bytes;
    };
    void bring(std::vector<Handle>& inputs, const Graph* graph);

    Stream& stream_;
    const Device& device_;
    std::unique_lock<std::recursive_mutex> turn_;
    std::optional<InContext> in_context_;
    void* guard_ = nullptr;
    std::vector<Handle> held_;
    std::vector<Home> homes_;
  };

 private:
  std::shared_ptr<const Device> device_;
  void* handle_;
  Fence fence_;
  std::vector<bool> brought_;
  bool home_;
  Pinned in_;
  Pinned out_;
};

}  // namespace aoti
