#include "stream.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

namespace aoti {

namespace {

constexpr std::size_t kAlignment = 64;

using Clock = std::chrono::steady_clock;

// A sleep and a wake-up cost about as much, so a thread asks for as long before it sleeps.
constexpr auto kSpin = std::chrono::microseconds(50);

// Pauses before the device is waited for again: after a capture has forbidden it, for as long as
// that takes; after another failure, so often.
constexpr std::chrono::nanoseconds kShortestPause = std::chrono::microseconds(16);
constexpr std::chrono::nanoseconds kLongestPause = std::chrono::milliseconds(1);
constexpr int kRetries = 32;

// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
constexpr std::int32_t kThreadLocal = 1;

// CU_EVENT_DISABLE_TIMING
constexpr unsigned kDisableTiming = 2;

// CUDA_ERROR_STREAM_CAPTURE_*: what was called is forbidden while a graph is recorded. Such a
// status does not tell whether the device is done.
bool is_forbidden(std::int32_t status) { return status >= 900 && status < 910; }

thread_local bool keeps_contexts = false;
thread_local const void* kept = nullptr;  // the context of the device that the lane works for

// Asks the device in a way that spoils no recording. False where it can't be asked.
bool works(const Driver& driver) {
  if (driver.query == nullptr) return false;
  const std::int32_t status = driver.query(driver.asked);  // an error that stays is every call's
  return status == 0 || status == driver.not_ready || is_forbidden(status);
}

struct Layout {
  bool known = false;
  char* data = nullptr;
  std::int64_t* sizes = nullptr;
  std::int64_t* strides = nullptr;
  std::int64_t dims = 0;
  std::int32_t dtype = 0;
  std::size_t bytes = 0;  // from the first element to the last, with all that lies between
};

Layout layout_of(const Shim& shim, BorrowedHandle tensor) {
  Layout layout;
  void* data = nullptr;
  check_torch(shim.get_dim(tensor, &layout.dims), "get_dim");
  check_torch(shim.get_sizes(tensor, &layout.sizes), "get_sizes");
  check_torch(shim.get_strides(tensor, &layout.strides), "get_strides");
  check_torch(shim.get_dtype(tensor, &layout.dtype), "get_dtype");
  check_torch(shim.get_data_ptr(tensor, &data), "get_data_ptr");
  layout.known = true;
  layout.data = static_cast<char*>(data);
  std::int64_t last = 0;
  for (std::int64_t dim = 0; dim < layout.dims; ++dim) {
    if (layout.sizes[dim] == 0) return layout;
    last += (layout.sizes[dim] - 1) * layout.strides[dim];
  }
  layout.bytes = static_cast<std::size_t>(last + 1) * shim.dtype_element_size(layout.dtype);
  return layout;
}

// Makes a tensor of the same sizes and strides on another device.
OwnedHandle empty_like(const Shim& shim, const Layout& layout, std::int32_t type,
                       std::int32_t index) {
  OwnedHandle made(shim.delete_tensor);
  check_torch(shim.empty_strided(layout.dims, layout.sizes, layout.strides, layout.dtype, type,
                                 index, made.receive()),
              "empty_strided");
  return made;
}

bool same_strides(const Layout& one, const Layout& other) {
  return one.dtype == other.dtype && one.dims == other.dims &&
         std::equal(one.strides, one.strides + one.dims, other.strides);
}

// Copies the elements of `from`. Along a dimension of stride 0, many elements are one element of
// `to`: only the first is copied, since torch refuses to write to one element several times.
void write(const Device& device, BorrowedHandle to, BorrowedHandle from) {
  const Shim& shim = device.shim;
  const Layout target = layout_of(shim, to);
  std::vector<std::int64_t> sizes;
  for (std::int64_t dim = 0; dim < target.dims; ++dim) {
    if (target.strides[dim] != 0 || target.sizes[dim] < 2) continue;
    if (sizes.empty()) sizes.assign(target.sizes, target.sizes + target.dims);
    sizes[static_cast<std::size_t>(dim)] = 1;
  }
  if (sizes.empty()) {
    check_torch(device.copy(to, from, 0), "copy_");
    return;
  }
  const Layout source = layout_of(shim, from);
  OwnedHandle once(shim.delete_tensor);
  OwnedHandle first(shim.delete_tensor);
  check_torch(
      shim.reinterpret_tensor(to, target.dims, sizes.data(), target.strides, 0, once.receive()),
      "copy_");
  check_torch(
      shim.reinterpret_tensor(from, source.dims, sizes.data(), source.strides, 0, first.receive()),
      "copy_");
  check_torch(device.copy(once.get(), first.get(), 0), "copy_");
}

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

void check_driver(const Driver& driver, std::int32_t status, const std::string& what) {
  if (status == 0) return;
  const char* words = nullptr;
  std::string text = what + " failed with status " + std::to_string(status);
  if (driver.explain != nullptr && driver.explain(status, &words) == 0 && words != nullptr) {
    text += std::string(": ") + words;
  }
  throw std::runtime_error(text);
}

void keep_contexts() { keeps_contexts = true; }

InContext::InContext(const Driver& driver, bool apart) : driver_(driver) {
  if (driver.set_context == nullptr) return;
  check_driver(driver, driver.get_context(&before_), "cuCtxGetCurrent");
  if (before_ != driver.context) {
    check_driver(driver, driver.set_context(driver.context), "cuCtxSetCurrent");
    restores_context_ = !keeps_contexts;
  }
  if (!apart || driver.exchange_capture_mode == nullptr) return;
  if (keeps_contexts && kept == driver.context) return;
  mode_ = kThreadLocal;
  driver.exchange_capture_mode(&mode_);
  restores_mode_ = !keeps_contexts;
  kept = driver.context;
}

InContext::~InContext() {
  if (restores_mode_) driver_.exchange_capture_mode(&mode_);
  if (restores_context_) driver_.set_context(before_);
}

void* Events::take(const Driver& driver) {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    free_.reserve(made_ + 1);
    void* made = nullptr;
    check_driver(driver, driver.make_event(&made, kDisableTiming), "cuEventCreate");
    ++made_;
    return made;
  }
  void* const event = free_.back();
  free_.pop_back();
  return event;
}

void Events::give(void* event) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(event);
}

void Events::destroy(const Driver& driver) noexcept {
  if (free_.empty() || driver.destroy_event == nullptr) return;
  try {
    const InContext in_context(driver);
    if (!works(driver)) return;
    for (void* const event : free_) driver.destroy_event(event);
  } catch (const std::runtime_error&) {  // NOLINT(bugprone-empty-catch)
    // The context is gone, and the events with it.
  }
}

Arrival::Arrival(std::shared_ptr<const Device> device, void* stream) : device_(std::move(device)) {
  const Driver& driver = device_->driver;
  const InContext in_context(driver, false);  // the default stream belongs to a context
  std::int32_t capturing = 0;
  const std::int32_t status = driver.is_capturing(stream, &capturing);
  if (capturing != 0 || is_forbidden(status)) {
    throw std::runtime_error(
        "the current stream is being recorded into a graph, or is the default stream while a "
        "stream that waits for it is. A request is no part of a recording: make it before or "
        "afterwards, or under another current stream");
  }
  check_driver(driver, status, "cuStreamIsCapturing");
  event_ = device_->events.take(driver);
  const std::int32_t recorded = driver.record_event(event_, stream);
  if (recorded == 0) return;
  device_->events.give(event_);
  check_driver(driver, recorded, "cuEventRecord");
}

Arrival::~Arrival() { device_->events.give(event_); }

void Arrival::precede(void* stream) const {
  const Driver& driver = device_->driver;
  check_driver(driver, driver.wait_for_event(stream, event_, 0), "cuStreamWaitEvent");
}

std::recursive_mutex& process_lock() {
  static std::recursive_mutex lock;
  return lock;
}

// --- Pinned -----------------------------------------------------------------------------------

Pinned::~Pinned() {
  if (memory_ == nullptr) return;
  try {
    const InContext in_context(driver_);
    driver_.free_host(memory_);
  } catch (const std::runtime_error&) {  // NOLINT(bugprone-empty-catch)
    // The device is lost, and its memory ends with the process.
  }
}

char* Pinned::reserve(std::size_t bytes) {
  if (bytes > bytes_) {
    // Twice the size before, so that works that grow bit by bit don't each make it again.
    const std::size_t wanted = std::max(bytes, 2 * bytes_);
    if (memory_ != nullptr) driver_.free_host(std::exchange(memory_, nullptr));
    bytes_ = 0;
    check_driver(driver_, driver_.allocate_host(&memory_, wanted), "cuMemAllocHost");
    bytes_ = wanted;
  }
  return static_cast<char*>(memory_);
}

void Pinned::prepare(std::size_t bytes) noexcept {
  try {
    const InContext in_context(driver_);
    static_cast<void>(reserve(bytes));
  } catch (const std::runtime_error&) {  // NOLINT(bugprone-empty-catch)
    // A run that needs the memory says so.
  }
}

void Pinned::abandon() {
  memory_ = nullptr;
  bytes_ = 0;
}

// --- Graph ------------------------------------------------------------------------------------

Graph::Graph(std::shared_ptr<const Device> its_device, void* its_executable,
             OwnedHandles its_inputs, OwnedHandles its_outputs)
    : device(std::move(its_device)),
      executable(its_executable),
      inputs(std::move(its_inputs)),
      outputs(std::move(its_outputs)),
      aliases(take_aliases(outputs)) {}

// --- Stream -----------------------------------------------------------------------------------

Stream::Stream(std::shared_ptr<const Device> device, void* handle, Fence fence,
               std::vector<bool> copies_in, bool copies_out, std::size_t bytes_in,
               std::size_t bytes_out)
    : device_(std::move(device)),
      handle_(handle),
      fence_(fence),
      copies_in_(std::move(copies_in)),
      copies_out_(copies_out),
      in_(device_->driver),
      out_(device_->driver) {
  if (device_->driver.copy_in == nullptr) return;
  if (bytes_in > 0) in_.prepare(bytes_in);
  if (bytes_out > 0) out_.prepare(bytes_out);
}

// --- StreamRun --------------------------------------------------------------------------------

StreamRun::StreamRun(Stream& stream)
    : stream_(stream),
      device_(*stream.device_),
      lock_(process_lock(), std::defer_lock),
      held_(device_.shim.delete_tensor) {
  in_context_.emplace(device_.driver);
  if (device_.one_at_a_time) lock_.lock();
  if (device_.guard == nullptr) return;
  check_torch(device_.guard(stream.handle_, device_.index, &guard_), "create_stream_guard");
}

StreamRun::~StreamRun() {
  held_.reset();  // in the device's context
  copies_.clear();
  detach();
}

void StreamRun::detach() {
  if (guard_ != nullptr) device_.unguard(std::exchange(guard_, nullptr));
  in_context_.reset();
}

bool StreamRun::ready() {
  const Driver& driver = device_.driver;
  if (driver.query == nullptr) return false;
  const std::int32_t status = driver.query(stream_.handle_);
  done_ = status == 0;
  return status != driver.not_ready && !is_forbidden(status);
}

void StreamRun::to_device(OwnedHandles& inputs, const Graph* graph) {
  const Shim& shim = device_.shim;
  const Driver& driver = device_.driver;
  std::vector<Layout> layouts(inputs.size());  // of the inputs that are copied to the device
  std::size_t bytes = 0;
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    std::int32_t type = 0;
    check_torch(device_.get_device_type(inputs[input], &type), "get_device_type");
    const bool copies = input < stream_.copies_in_.size() && stream_.copies_in_[input] &&
                        type == shim.cpu && device_.type != shim.cpu;
    if (!copies) continue;
    layouts[input] = layout_of(shim, inputs[input]);
    bytes += aligned(layouts[input].bytes);
  }
  char* staged = driver.copy_in != nullptr && bytes > 0 ? stream_.in_.reserve(bytes) : nullptr;
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    const Layout& layout = layouts[input];
    const BorrowedHandle own = graph != nullptr ? graph->inputs[input] : nullptr;
    if (layout.known) {
      const bool straight = own != nullptr && same_strides(layout, layout_of(shim, own));
      OwnedHandle made;
      if (!straight) made = empty_like(shim, layout, device_.type, device_.index);
      const BorrowedHandle there = straight ? own : made.get();
      OwnedHandle host = inputs.exchange(input, std::move(made));
      const BorrowedHandle here = host.get();
      held_.push_back(std::move(host));
      if (layout.bytes > 0 && driver.copy_in != nullptr) {
        void* target = nullptr;
        check_torch(shim.get_data_ptr(there, &target), "get_data_ptr");
        std::memcpy(staged, layout.data, layout.bytes);
        check_driver(driver,
                     driver.copy_in(reinterpret_cast<std::uintptr_t>(target), staged, layout.bytes,
                                    stream_.handle_),
                     "cuMemcpyHtoDAsync");
        staged += aligned(layout.bytes);
      } else if (layout.bytes > 0) {
        write(device_, there, here);
      }
    }
    if (own != nullptr) {
      OwnedHandle given = inputs.exchange(input);
      if (!given) continue;
      const BorrowedHandle source = given.get();
      held_.push_back(std::move(given));
      write(device_, own, source);
      continue;
    }
    OwnedHandle another(shim.delete_tensor);
    check_torch(device_.new_handle(inputs[input], another.receive()), "new_tensor_handle");
    held_.push_back(std::move(another));
  }
}

void StreamRun::launch(const Graph& graph, OwnedHandles& inputs, OwnedHandles& outputs) {
  to_device(inputs, &graph);
  check_driver(device_.driver, device_.driver.launch_graph(graph.executable, stream_.handle_),
               "cuGraphLaunch");
  start_copies(graph.outputs);
  std::vector<bool> copied(outputs.size());
  for (const OutputCopy& copy : copies_) copied[copy.output] = true;
  for (std::size_t output = 0; output < outputs.size(); ++output) {
    if (graph.outputs[output] == nullptr || copied[output]) continue;
    check_torch(device_.shim.clone(graph.outputs[output], outputs.receive(output)), "clone");
  }
}

void StreamRun::start_copies(const OwnedHandles& outputs) {
  if (!stream_.copies_out_) return;
  const Shim& shim = device_.shim;
  const Driver& driver = device_.driver;
  std::vector<Layout> layouts(outputs.size());
  std::size_t bytes = 0;
  for (std::size_t output = 0; output < outputs.size(); ++output) {
    std::int32_t type = 0;
    if (outputs[output] == nullptr) continue;
    check_torch(device_.get_device_type(outputs[output], &type), "get_device_type");
    if (type != device_.type) continue;
    layouts[output] = layout_of(shim, outputs[output]);
    copies_.push_back({output, OwnedHandle(), nullptr, nullptr, layouts[output].bytes});
    bytes += aligned(layouts[output].bytes);
  }
  char* staged = driver.copy_out != nullptr && bytes > 0 ? stream_.out_.reserve(bytes) : nullptr;
  for (OutputCopy& copy : copies_) {
    const Layout& layout = layouts[copy.output];
    copy.tensor = empty_like(shim, layout, shim.cpu, 0);
    if (copy.bytes == 0) continue;
    if (driver.copy_out == nullptr) {
      check_torch(device_.copy(copy.tensor.get(), outputs[copy.output], 0), "copy_");
      continue;
    }
    check_torch(shim.get_data_ptr(copy.tensor.get(), &copy.to), "get_data_ptr");
    check_driver(driver,
                 driver.copy_out(staged, reinterpret_cast<std::uintptr_t>(layout.data), copy.bytes,
                                 stream_.handle_),
                 "cuMemcpyDtoHAsync");
    copy.from = staged;
    staged += aligned(copy.bytes);
  }
}

void StreamRun::fence() {
  const Fence& fence = stream_.fence_;
  if (!in_context_) in_context_.emplace(device_.driver);
  if (done_) return;
  if (fence.wait != nullptr) fence.wait(fence.argument);
  if (fence.fence == nullptr) return;
  auto pause = kShortestPause;
  std::int32_t status = wait();
  for (int retries = 0; status != 0; status = wait()) {
    if (!is_forbidden(status) && (retries++ == kRetries || !works(device_.driver))) break;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, kLongestPause);
  }
  if (status != 0 && works(device_.driver)) {
    static_cast<void>(held_.release());
    stream_.in_.abandon();
    stream_.out_.abandon();
  }
  check_driver(device_.driver, status, "waiting for the device");
}

std::int32_t StreamRun::wait() const {
  const Fence& fence = stream_.fence_;
  const Driver& driver = device_.driver;
  if (fence.event != nullptr) {
    const std::int32_t status = driver.record_event(fence.event, stream_.handle_);
    if (status != 0) return status;
    const auto until = Clock::now() + kSpin;
    while (driver.query_event(fence.event) == driver.not_ready && Clock::now() < until) {
    }
  }
  return fence.fence(fence.argument);
}

void StreamRun::forget_error() const {
  if (device_.driver.take_last_error != nullptr) device_.driver.take_last_error();
}

void StreamRun::finish_copies(OwnedHandles& outputs) {
  for (OutputCopy& copy : copies_) {
    if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
    static_cast<void>(outputs.exchange(copy.output, std::move(copy.tensor)));
  }
}

}  // namespace aoti
