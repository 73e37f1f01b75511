// Streams: the steps around a run whose work is done by a device and not by the calling thread.
//
// Nothing here knows torch, Python or a device's library: their functions arrive as pointers. Where
// a driver has copies (CUDA), the copies are asynchronous and go through pinned memory; elsewhere
// torch copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "handle.hpp"
#include "shim.hpp"

namespace aoti {

// A stream as torch passes one by value (`c10::Stream`).
struct TorchStream {
  std::int8_t device_type = 0;
  std::int8_t device_index = 0;
  std::int64_t id = 0;
};

// Waits until the stream's device work is complete; 0 is success.
using FenceFunction = std::int32_t (*)(void* argument);

// A driver's functions, or null where torch serves. For CUDA: cuCtxGetCurrent, cuCtxSetCurrent,
// cuThreadExchangeStreamCaptureMode, cuStreamQuery, cuStreamIsCapturing, cuStreamWaitEvent,
// cuEventCreate, cuEventDestroy, cuEventRecord, cuEventQuery, cuMemcpyHtoDAsync, cuMemcpyDtoHAsync,
// cuMemAllocHost, cuMemFreeHost, cuGraphLaunch, cuGetErrorString, and the runtime's
// cudaGetLastError.
struct Driver {
  void* context = nullptr;
  std::int32_t (*get_context)(void** context) = nullptr;
  std::int32_t (*set_context)(void* context) = nullptr;
  std::int32_t (*exchange_capture_mode)(std::int32_t* mode) = nullptr;
  std::int32_t (*query)(void* stream) = nullptr;
  std::int32_t (*is_capturing)(void* stream, std::int32_t* status) = nullptr;
  std::int32_t (*make_event)(void** made, unsigned flags) = nullptr;
  std::int32_t (*destroy_event)(void* event) = nullptr;
  std::int32_t (*wait_for_event)(void* stream, void* event, unsigned flags) = nullptr;
  std::int32_t (*record_event)(void* event, void* stream) = nullptr;
  std::int32_t (*query_event)(void* event) = nullptr;
  std::int32_t (*copy_in)(std::uint64_t to, const void* from, std::size_t bytes,
                          void* stream) = nullptr;
  std::int32_t (*copy_out)(void* to, std::uint64_t from, std::size_t bytes, void* stream) = nullptr;
  std::int32_t (*allocate_host)(void** made, std::size_t bytes) = nullptr;
  std::int32_t (*free_host)(void* memory) = nullptr;
  std::int32_t (*launch_graph)(void* executable, void* stream) = nullptr;
  std::int32_t (*explain)(std::int32_t error, const char** words) = nullptr;
  // Returns the thread's last error of the runtime, and forgets it.
  std::int32_t (*take_last_error)() = nullptr;
  std::int32_t not_ready = 0;  // what `query` returns while the stream has work to do
  // A stream without work, which is queried to find out whether the device is lost. The default
  // stream won't do: while a stream that waits for it is recorded, a query spoils the recording.
  void* asked = nullptr;
};

// A driver's events. Those that are free serve the next request.
class Events {
 public:
  // Returns a free event, or makes one in the current context. Throws.
  [[nodiscard]] void* take(const Driver& driver);
  void give(void* event) noexcept;
  // Destroys the free events, unless the device is lost: then they end with the process.
  void destroy(const Driver& driver) noexcept;

 private:
  std::mutex mutex_;
  std::vector<void*> free_;  // has room for all events
  std::size_t made_ = 0;
};

struct Device {
  Device() = default;
  ~Device() { events.destroy(driver); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Shim shim;
  std::int32_t (*new_handle)(BorrowedHandle tensor, Handle* made) = nullptr;
  std::int32_t (*get_device_type)(BorrowedHandle tensor, std::int32_t* type) = nullptr;
  std::int32_t (*copy)(BorrowedHandle to, BorrowedHandle from, std::int32_t non_blocking) = nullptr;
  // Makes a stream the calling thread's current one: memory made meanwhile is of the stream's pool.
  // Null for devices without current streams.
  std::int32_t (*guard)(void* stream, std::int32_t index, void** made) = nullptr;
  std::int32_t (*unguard)(void* guard) = nullptr;
  // Tells torch's allocator that a stream uses a tensor (`at::_ops::record_stream::call`). Throws.
  void (*record_use)(BorrowedHandle tensor, TorchStream stream) = nullptr;
  std::int32_t type = 0;  // torch's number for this kind of device
  std::int32_t index = 0;
  bool one_at_a_time = false;  // of all works in the process
  Driver driver;
  mutable Events events;
};

// Throws std::runtime_error, with the driver's words, unless the status is 0.
void check_driver(const Driver& driver, std::int32_t status, const std::string& what);

// The calling thread is a lane's: it keeps the context that it once had for a run.
void keep_contexts();

// Makes the device's context the calling thread's current one, and restores the one before: the
// thread may be a user's. With `apart`, no capture of another thread forbids what the thread calls
// meanwhile, or is spoilt by it.
class InContext {
 public:
  explicit InContext(const Driver& driver, bool apart = true);
  ~InContext();
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  const Driver& driver_;
  void* before_ = nullptr;
  std::int32_t mode_ = 0;
  bool restores_context_ = false;
  bool restores_mode_ = false;
};

// The point in the work of a stream at which a request came, as an event. The event is free when
// the last reference to this is gone: by then each wait for it has been enqueued.
class Arrival {
 public:
  // Does not block. Throws std::runtime_error, also while the stream, or one that the default
  // stream waits for, is recorded into a graph.
  Arrival(std::shared_ptr<const Device> device, void* stream);
  ~Arrival();
  Arrival(const Arrival&) = delete;
  Arrival& operator=(const Arrival&) = delete;

  // Lets later work on a stream wait for this point. The device's context is current, or the stream
  // is not the default one. Does not block. Throws std::runtime_error.
  void precede(void* stream) const;

 private:
  std::shared_ptr<const Device> device_;
  void* event_;
};

// Held by the thread that works on a device that takes one work of the process at a time.
[[nodiscard]] std::recursive_mutex& process_lock();

// How a slot waits for its device: with `fence`, or with `wait`, which throws. Each gets the
// argument. An `event` is recorded on the stream before, and asked for shortly before the thread
// goes to sleep.
struct Fence {
  FenceFunction fence = nullptr;
  void (*wait)(void* argument) = nullptr;
  void* argument = nullptr;
  void* event = nullptr;
};

// Pinned memory that is kept for the next work; plain memory where the driver has none.
class Pinned {
 public:
  explicit Pinned(const Driver& driver) : driver_(driver) {}
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  // Returns at least this many bytes, and discards the contents: no copy may be under way. Throws
  // std::runtime_error.
  [[nodiscard]] char* reserve(std::size_t bytes);
  // Returns at least this many bytes beforehand, if there is memory for them.
  void prepare(std::size_t bytes) noexcept;
  // Leaves the memory to a device that may still use it, for ever.
  void abandon();

 private:
  const Driver& driver_;
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

// A recorded run of a model, which the driver launches as one thing. The graph reads its own inputs
// and writes its own outputs. An output is null where the model left it out and where it is an
// alias.
struct Graph {
  // An output that is the same tensor as an earlier one has that one's handle.
  Graph(std::shared_ptr<const Device> device, void* executable, OwnedHandles inputs,
        OwnedHandles outputs);

  std::shared_ptr<const Device> device;
  void* executable;
  OwnedHandles inputs;
  OwnedHandles outputs;
  std::vector<Alias> aliases;
};

// A slot's stream. One run at a time is on it.
class Stream {
 public:
  // `copies_in` says of each input whether it is copied to the device where it lies on the host.
  // With `copies_out`, outputs are copied to the host. `bytes_in` and `bytes_out` are what copies
  // are expected to take at most, so that a run need not make room for them.
  Stream(std::shared_ptr<const Device> device, void* handle, Fence fence,
         std::vector<bool> copies_in, bool copies_out, std::size_t bytes_in = 0,
         std::size_t bytes_out = 0);

  [[nodiscard]] const Device& device() const { return *device_; }
  [[nodiscard]] void* handle() const { return handle_; }
  // Returns whether a thread may detach from a run and poll for its end.
  [[nodiscard]] bool can_poll() const {
    return device_->driver.query != nullptr && !device_->one_at_a_time;
  }

 private:
  friend class StreamRun;

  std::shared_ptr<const Device> device_;
  void* handle_;
  Fence fence_;
  std::vector<bool> copies_in_;
  bool copies_out_;
  Pinned in_;
  Pinned out_;
};

// A run on a stream: it lives from before the inputs are copied until the device is done. One
// thread uses it from the beginning to the end.
class StreamRun {
 public:
  // Waits for the process's lock on a device that takes one work at a time, and makes the stream
  // the thread's current one.
  explicit StreamRun(Stream& stream);
  ~StreamRun();
  StreamRun(const StreamRun&) = delete;
  StreamRun& operator=(const StreamRun&) = delete;

  // Lets the run wait for a point in the work of another stream.
  void follow(const Arrival& arrival) const { arrival.precede(stream_.handle_); }
  // Replaces each input that belongs on the device by a tensor there. Keeps a handle of every
  // input: the model frees inputs when it has launched, and not when the device is done.
  void to_device(OwnedHandles& inputs) { to_device(inputs, nullptr); }
  // Replaces the model's run: copies the inputs to the graph's, launches the graph, and copies its
  // outputs.
  void launch(const Graph& graph, OwnedHandles& inputs, OwnedHandles& outputs);
  // Starts to copy the outputs to the host, behind the run.
  void start_copies(const OwnedHandles& outputs);
  // Separates the calling thread from this run, until `fence`.
  void detach();
  // Returns whether the device is done or has failed, so that `fence` does not wait. Always false
  // where the driver can't be polled.
  [[nodiscard]] bool ready();
  // Waits for the device. Required after every failure too: the device may still use the memory
  // that is freed next. When the wait fails although the device works, that memory is never freed.
  void fence();
  // Forgets the error that a failed run has left the thread, which torch would take for its own.
  void forget_error() const;
  // Replaces the outputs by their copies on the host. Follows `fence`.
  void finish_copies(OwnedHandles& outputs);

 private:
  struct OutputCopy {
    std::size_t output;
    OwnedHandle tensor;
    void* to;
    const char* from;  // in pinned memory; null where the copy needs no second step
    std::size_t bytes;
  };
  void to_device(OwnedHandles& inputs, const Graph* graph);
  [[nodiscard]] std::int32_t wait() const;

  Stream& stream_;
  const Device& device_;
  std::unique_lock<std::recursive_mutex> lock_;
  std::optional<InContext> in_context_;
  void* guard_ = nullptr;
  bool done_ = false;  // `ready` has seen the end
  OwnedHandles held_;  // until the device is done
  std::vector<OutputCopy> copies_;
};

}  // namespace aoti
