#include "stream.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace aoti {

namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::int32_t kNotReady = 600;  // CUDA_ERROR_NOT_READY

void demand(std::int32_t status, const char* function) {
  if (status != 0) throw TorchRefused(function);
}

struct Layout {
  bool known = false;
  char* data = nullptr;
  std::int64_t* sizes = nullptr;
  std::int64_t* strides = nullptr;
  std::int64_t dims = 0;
  std::int32_t dtype = 0;
  std::size_t bytes = 0;  // from its first element to its last, whatever lies between
};

Layout layout_of(const Shim& shim, Handle tensor) {
  Layout layout;
  void* data = nullptr;
  demand(shim.get_dim(tensor, &layout.dims), "get_dim");
  demand(shim.get_sizes(tensor, &layout.sizes), "get_sizes");
  demand(shim.get_strides(tensor, &layout.strides), "get_strides");
  demand(shim.get_dtype(tensor, &layout.dtype), "get_dtype");
  demand(shim.get_data_ptr(tensor, &data), "get_data_ptr");
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

// A tensor of the same sizes and strides on another device.
Handle like(const Shim& shim, const Layout& layout, std::int32_t type, std::int32_t index) {
  Handle made = nullptr;
  demand(shim.empty_strided(layout.dims, layout.sizes, layout.strides, layout.dtype, type, index, &made),
         "empty_strided");
  return made;
}

bool same_strides(const Layout& one, const Layout& other) {
  return one.dtype == other.dtype && one.dims == other.dims && std::equal(one.strides, one.strides + one.dims, other.strides);
}

// Copies the elements of `from`. Of those that are one element of `to`, along a dimension of stride 0, the first is copied: torch
// refuses to write to one element several times.
void write(const Device& device, Handle to, Handle from) {
  const Shim& shim = device.shim;
  const Layout target = layout_of(shim, to);
  std::vector<std::int64_t> sizes;
  for (std::int64_t dim = 0; dim < target.dims; ++dim) {
    if (target.strides[dim] != 0 || target.sizes[dim] < 2) continue;
    if (sizes.empty()) sizes.assign(target.sizes, target.sizes + target.dims);
    sizes[static_cast<std::size_t>(dim)] = 1;
  }
  if (sizes.empty()) {
    demand(device.copy(to, from, 0), "copy_");
    return;
  }
  const Layout source = layout_of(shim, from);
  Handle once = nullptr;
  Handle first = nullptr;
  std::int32_t status = shim.reinterpret_tensor(to, target.dims, sizes.data(), target.strides, 0, &once);
  if (status == 0) status = shim.reinterpret_tensor(from, source.dims, sizes.data(), source.strides, 0, &first);
  if (status == 0) status = device.copy(once, first, 0);
  if (first != nullptr) shim.delete_tensor(first);
  if (once != nullptr) shim.delete_tensor(once);
  demand(status, "copy_");
}

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void demand(const Driver& driver, std::int32_t status, const std::string& what) {
  if (status == 0) return;
  const char* words = nullptr;
  std::string text = what + " failed with status " + std::to_string(status);
  if (driver.explain != nullptr && driver.explain(status, &words) == 0 && words != nullptr) text += std::string(": ") + words;
  throw std::runtime_error(text);
}

InContext::InContext(const Driver& driver) : driver_(driver) {
  if (driver.set_context == nullptr) return;
  demand(driver, driver.get_context(&before_), "cuCtxGetCurrent");
  demand(driver, driver.set_context(driver.context), "cuCtxSetCurrent");
}

InContext::~InContext() {
  if (driver_.set_context != nullptr) driver_.set_context(before_);
}

std::recursive_mutex& process_turn() {
  static std::recursive_mutex turn;
  return turn;
}

// --- Pinned -----------------------------------------------------------------------------------------------

Pinned::~Pinned() {
  if (memory_ == nullptr) return;
  try {
    const InContext in_context(driver_);
    driver_.free_host(memory_);
  } catch (const std::runtime_error&) {
    // The device is lost, and its memory ends with the process.
  }
}

char* Pinned::of(std::size_t bytes) {
  if (bytes > bytes_) {
    // Twice as much as before, so that works that grow bit by bit do not each make it anew.
    const std::size_t wanted = std::max(bytes, 2 * bytes_);
    if (memory_ != nullptr) driver_.free_host(std::exchange(memory_, nullptr));
    bytes_ = 0;
    demand(driver_, driver_.allocate_host(&memory_, wanted), "cuMemAllocHost");
    bytes_ = wanted;
  }
  return static_cast<char*>(memory_);
}

// --- Graph ------------------------------------------------------------------------------------------------

Graph::Graph(std::shared_ptr<const Device> its_device, void* its_executable, std::vector<Handle> its_inputs,
             std::vector<Handle> its_outputs)
    : device(std::move(its_device)),
      executable(its_executable),
      inputs(std::move(its_inputs)),
      outputs(std::move(its_outputs)),
      aliases(take_aliases(outputs)) {}

Graph::~Graph() {
  for (const std::vector<Handle>* handles : {&inputs, &outputs}) {
    for (Handle handle : *handles) {
      if (handle != nullptr) device->shim.delete_tensor(handle);
    }
  }
}

// --- Stream -----------------------------------------------------------------------------------------------

Stream::Stream(std::shared_ptr<const Device> device, void* handle, Fence fence, std::vector<bool> brought, bool home)
    : device_(std::move(device)),
      handle_(handle),
      fence_(fence),
      brought_(std::move(brought)),
      home_(home),
      in_(device_->driver),
      out_(device_->driver) {}

Stream::Run::Run(Stream& stream)
    : stream_(stream),
      device_(*stream.device_),
      turn_(process_turn(), std::defer_lock) {
  in_context_.emplace(device_.driver);
  if (device_.one_at_a_time) turn_.lock();
  if (device_.guard != nullptr) demand(device_.guard(stream.handle_, device_.index, &guard_), "create_stream_guard");
}

Stream::Run::~Run() {
  for (Handle handle : held_) device_.shim.delete_tensor(handle);
  for (const Home& home : homes_) {
    if (home.tensor != nullptr) device_.shim.delete_tensor(home.tensor);
  }
  leave();
}

void Stream::Run::leave() {
  if (guard_ != nullptr) device_.unguard(std::exchange(guard_, nullptr));
  in_context_.reset();
}

bool Stream::Run::ready() const {
  if (device_.driver.query == nullptr) return false;
  const InContext in_context(device_.driver);
  return device_.driver.query(stream_.handle_) != kNotReady;
}

void Stream::Run::bring(std::vector<Handle>& inputs, const Graph* graph) {
  const Shim& shim = device_.shim;
  const Driver& driver = device_.driver;
  std::vector<Layout> layouts(inputs.size());  // of what is brought
  std::size_t bytes = 0;
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    std::int32_t type = 0;
    demand(device_.get_device_type(inputs[input], &type), "get_device_type");
    const bool brings = input < stream_.brought_.size() && stream_.brought_[input] && type == shim.cpu &&
                        device_.type != shim.cpu;
    if (!brings) continue;
    layouts[input] = layout_of(shim, inputs[input]);
    bytes += aligned(layouts[input].bytes);
  }
  char* staged = driver.copy_in != nullptr && bytes > 0 ? stream_.in_.of(bytes) : nullptr;
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    const Layout& layout = layouts[input];
    const Handle own = graph != nullptr ? graph->inputs[input] : nullptr;
    if (layout.known) {
      const bool straight = own != nullptr && same_strides(layout, layout_of(shim, own));
      const Handle there = straight ? own : like(shim, layout, device_.type, device_.index);
      const Handle here = std::exchange(inputs[input], straight ? nullptr : there);
      held_.push_back(here);
      if (layout.bytes > 0 && driver.copy_in != nullptr) {
        void* target = nullptr;
        demand(shim.get_data_ptr(there, &target), "get_data_ptr");
        std::memcpy(staged, layout.data, layout.bytes);
        demand(driver,
               driver.copy_in(reinterpret_cast<std::uintptr_t>(target), staged, layout.bytes, stream_.handle_),
               "cuMemcpyHtoDAsync");
        staged += aligned(layout.bytes);
      } else if (layout.bytes > 0) {
        write(device_, there, here);
      }
    }
    if (own != nullptr) {
      const Handle given = std::exchange(inputs[input], nullptr);
      if (given == nullptr) continue;
      held_.push_back(given);
      write(device_, own, given);
      continue;
    }
    Handle held = nullptr;
    demand(device_.new_handle(inputs[input], &held), "new_tensor_handle");
    held_.push_back(held);
  }
}

void Stream::Run::launch(const Graph& graph, std::vector<Handle>& inputs, std::vector<Handle>& outputs) {
  bring(inputs, &graph);
  demand(device_.driver, device_.driver.launch_graph(graph.executable, stream_.handle_), "cuGraphLaunch");
  send_home(graph.outputs);
  std::vector<bool> comes_home(outputs.size());
  for (const Home& home : homes_) comes_home[home.output] = true;
  for (std::size_t output = 0; output < outputs.size(); ++output) {
    if (graph.outputs[output] == nullptr || comes_home[output]) continue;
    demand(device_.shim.clone(graph.outputs[output], &outputs[output]), "clone");
  }
}

void Stream::Run::send_home(const std::vector<Handle>& outputs) {
  if (!stream_.home_) return;
  const Shim& shim = device_.shim;
  const Driver& driver = device_.driver;
  std::vector<Layout> layouts(outputs.size());
  std::size_t bytes = 0;
  for (std::size_t output = 0; output < outputs.size(); ++output) {
    std::int32_t type = 0;
    if (outputs[output] == nullptr) continue;
    demand(device_.get_device_type(outputs[output], &type), "get_device_type");
    if (type != device_.type) continue;
    layouts[output] = layout_of(shim, outputs[output]);
    homes_.push_back({output, nullptr, nullptr, nullptr, layouts[output].bytes});
    bytes += aligned(layouts[output].bytes);
  }
  char* staged = driver.copy_out != nullptr && bytes > 0 ? stream_.out_.of(bytes) : nullptr;
  for (Home& home : homes_) {
    const Layout& layout = layouts[home.output];
    home.tensor = like(shim, layout, shim.cpu, 0);
    if (home.bytes == 0) continue;
    if (driver.copy_out == nullptr) {
      demand(device_.copy(home.tensor, outputs[home.output], 0), "copy_");
      continue;
    }
    demand(shim.get_data_ptr(home.tensor, &home.to), "get_data_ptr");
    demand(driver, driver.copy_out(staged, reinterpret_cast<std::uintptr_t>(layout.data), home.bytes, stream_.handle_),
           "cuMemcpyDtoHAsync");
    home.from = staged;
    staged += aligned(home.bytes);
  }
}

void Stream::Run::fence() {
  const Fence& fence = stream_.fence_;
  if (!in_context_) in_context_.emplace(device_.driver);
  if (fence.wait != nullptr) fence.wait(fence.argument);
  if (fence.fence != nullptr) demand(device_.driver, fence.fence(fence.argument), "waiting for the device");
}

void Stream::Run::land(std::vector<Handle>& outputs) {
  for (Home& home : homes_) {
    if (home.from != nullptr) std::memcpy(home.to, home.from, home.bytes);
    const Handle left = std::exchange(outputs[home.output], std::exchange(home.tensor, nullptr));
    if (left != nullptr) device_.shim.delete_tensor(left);
  }
}

}  // namespace aoti
