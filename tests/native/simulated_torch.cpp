// Torch's own tensors on the simulated CUDA device: what a build of torch with CUDA would bring,
// for torch's third kind of device (PrivateUse1). Memory, streams and copies are the simulated
// driver's; anything that is computed is fetched, computed by the CPU's kernels and put back, in
// the order of the current stream. After that, as after each kernel, torch asks for the thread's
// last error, which any earlier call may have left.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "simulated_cuda.h"

namespace {

constexpr c10::DeviceType kSimulated = c10::DeviceType::PrivateUse1;

thread_local CUstream current_stream = nullptr;
thread_local c10::DeviceIndex current_device = 0;

void must(int error, const char* what) {
  const char* words = "";
  if (error != 0) cuGetErrorString(error, &words);
  TORCH_CHECK(error == 0, "CUDA error: ", words, " (", what, ")");
}

void need_context() {
  CUcontext context = nullptr;
  cuInit(0);
  cuCtxGetCurrent(&context);
  if (context != nullptr) return;
  cuDevicePrimaryCtxRetain(&context, current_device);
  cuCtxSetCurrent(context);
}

void delete_memory(void* memory) { sim_free(memory); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    need_context();
    void* memory = nullptr;
    if (bytes > 0) {
      memory = sim_allocate(bytes, current_stream);
      TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr,
                       "CUDA out of memory. Tried to allocate ", bytes, " bytes");
    }
    return {
        memory, memory, memory == nullptr ? nullptr : &delete_memory, {kSimulated, current_device}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &delete_memory; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    must(cuMemcpyDtoDAsync_v2(reinterpret_cast<CUdeviceptr>(to),
                              reinterpret_cast<CUdeviceptr>(from), bytes, current_stream),
         "copy");
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kSimulated, &allocator)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kSimulated> {
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(kSimulated, current_device);
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kSimulated, current_device}; }
  void setDevice(c10::Device device) const override {
    current_device = device.index() < 0 ? 0 : device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index() < 0 ? 0 : device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return of(current_stream, device.index());
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return of(nullptr, device.index());
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const c10::Stream before = getStream(stream.device());
    current_stream = reinterpret_cast<CUstream>(stream.id());
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  void synchronizeStream(const c10::Stream& stream) const override {
    need_context();
    must(cuStreamSynchronize(reinterpret_cast<CUstream>(stream.id())), "synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    need_context();
    must(cuCtxSynchronize(), "synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    if (data.get() != nullptr) sim_record_use(data.get(), reinterpret_cast<CUstream>(stream.id()));
  }

 private:
  static c10::Stream of(CUstream stream, c10::DeviceIndex index) {
    return c10::Stream(c10::Stream::UNSAFE, {kSimulated, index < 0 ? current_device : index},
                       reinterpret_cast<c10::StreamId>(stream));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::Device getDeviceFromPtr(void* data) const override {
    return {kSimulated, static_cast<c10::DeviceIndex>(sim_device_of(data))};
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr made = allocator.allocate(bytes);
    const size_t kept = std::min(bytes, storage.nbytes());
    if (kept > 0) allocator.copy_data(made.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(made));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys,
                                           c10::dtype_or_default(dtype));
}

// Bytes from the first element to the last. Both tensors have the same strides.
size_t span(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return static_cast<size_t>(last + 1) * tensor.element_size();
}

// Between the host and the device, through pinned memory, waited for.
void move(void* to, const void* from, size_t bytes, bool in) {
  void* staged = nullptr;
  if (bytes == 0) return;
  need_context();
  must(cuMemAllocHost_v2(&staged, bytes), "pinned memory");
  int error = 0;
  if (in) {
    std::memcpy(staged, from, bytes);
    error = cuMemcpyHtoDAsync_v2(reinterpret_cast<CUdeviceptr>(to), staged, bytes, current_stream);
  } else {
    error =
        cuMemcpyDtoHAsync_v2(staged, reinterpret_cast<CUdeviceptr>(from), bytes, current_stream);
  }
  if (error == 0) error = cuStreamSynchronize(current_stream);
  if (error == 0 && !in) std::memcpy(to, staged, bytes);
  cuMemFreeHost(staged);
  must(error, "copy");
  must(cudaGetLastError(), "kernel launch");
}

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  at::Tensor host =
      at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  move(host.mutable_data_ptr(), tensor.const_data_ptr(), span(tensor), false);
  return host;
}

void put(const at::Tensor& to, const at::Tensor& from) {
  if (to.is_cpu()) {
    to.copy_(from);
    return;
  }
  at::Tensor host = on_host(to);  // what lies between its elements stays
  host.copy_(from);
  move(to.mutable_data_ptr(), host.const_data_ptr(), span(to), true);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  put(to, on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  put(to, on_host(from));
  return to;
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);  // a view: it looks at no memory
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  return at::native::view(self, size);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size,
                         std::optional<at::MemoryFormat>) {
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(size)) * self.element_size();
  if (self.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  if (self.storage().data() != nullptr) {
    sim_record_use(self.storage().mutable_data(), reinterpret_cast<CUstream>(stream.id()));
  }
}

at::Scalar local_scalar(const at::Tensor& self) { return on_host(self).item(); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("resize_", &resize);
  library.impl("record_stream", &record_stream);
  library.impl("_local_scalar_dense", &local_scalar);
}

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

// cuBLAS's workspaces, each of one thread's handle on one stream. They stay until they are cleared.
std::mutex workspaces_mutex;
std::map<std::pair<std::thread::id, CUstream>, c10::DataPtr> workspaces;
constexpr size_t kWorkspace = 4096;

struct StreamGuard {
  CUstream stream;
  c10::DeviceIndex device;
};

}  // namespace

extern "C" {

// Of torch's shim, where it is built with CUDA.
std::int32_t aoti_torch_create_cuda_stream_guard(void* stream, std::int32_t index, void** made) {
  *made = new StreamGuard{current_stream, current_device};
  current_stream = static_cast<CUstream>(stream);
  current_device = static_cast<c10::DeviceIndex>(index);
  return 0;
}

std::int32_t aoti_torch_delete_cuda_stream_guard(void* guard) {
  const StreamGuard* before = static_cast<StreamGuard*>(guard);
  current_stream = before->stream;
  current_device = before->device;
  delete before;
  return 0;
}

void* simulated_workspace(void* stream, std::size_t* bytes) {
  const std::lock_guard lock(workspaces_mutex);
  c10::DataPtr& workspace = workspaces[{std::this_thread::get_id(), static_cast<CUstream>(stream)}];
  if (!workspace) workspace = allocator.allocate(kWorkspace);
  *bytes = kWorkspace;
  return workspace.get();
}

// As `at::cuda::clearCublasWorkspacesForStream`.
void simulated_clear_workspaces_for_stream(void* stream) {
  const std::lock_guard lock(workspaces_mutex);
  for (auto one = workspaces.begin(); one != workspaces.end();) {
    one = one->first.second == stream ? workspaces.erase(one) : std::next(one);
  }
}

// As `torch._C._cuda_clearCublasWorkspaces`.
void simulated_clear_workspaces() {
  const std::lock_guard lock(workspaces_mutex);
  workspaces.clear();
}

std::int32_t simulated_workspaces() {
  const std::lock_guard lock(workspaces_mutex);
  return static_cast<std::int32_t>(workspaces.size());
}

void simulated_register() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

void* simulated_current_stream() { return current_stream; }
void simulated_set_stream(void* stream) { current_stream = static_cast<CUstream>(stream); }
}
