// A compiled model as AOTInductor makes them for CUDA, over the simulated device: y = x * w, one
// row after the other, with w in two buffers on the device. It launches and returns; what it took
// is freed then, whether or not the device is done.
//
// As torch's runtime does, it writes constants on the default stream, waits only for copies from
// the host, and leaves its device the calling thread's current one. Made for a device without a
// number, as MPS is, it refuses constants from the host.
//
// `RunSingleThreaded` takes the first instance that is free without a look whether there is one;
// `Run` puts the one that it took with those whose end is not known yet, and takes them all back
// when it finds no other.
//
// Its weights lie in memory of cudaMalloc, which is freed when the container is, in the device's
// context. With OLDER, it is as torch 2.12 and older compile: constants travel in maps, what frees
// them ends the process where the device is lost, and `RunSingleThreaded` looks at the state of the
// first buffer, whichever serves.
//
// With CHAIN, y = x * w * w by two kernels, and what lies between is given back when they are
// launched. The second one uses a workspace as cuBLAS has one: of the thread and the stream. When x
// has 13 rows, the model waits for the device, as models do that look at a value; when x has 17, it
// draws random numbers.
//
// With TWICE, y is both of two outputs, by one handle as torch's models have it.
//
// With ROW, the rows of x lie so many elements apart, whatever strides x has, as code is compiled
// for the strides of its example.
//
// With MIXED, y = x * w * f: f is a constant of the model that lies in the host's memory, as
// torch's may.
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "simulated_cuda.h"

using Handle = void*;

extern "C" {
// Of torch's shim.
std::int32_t aoti_torch_get_data_ptr(Handle, void**);
std::int32_t aoti_torch_get_sizes(Handle, std::int64_t**);
std::int32_t aoti_torch_get_device_type(Handle, std::int32_t*);
std::int32_t aoti_torch_empty_strided(std::int64_t, const std::int64_t*, const std::int64_t*,
                                      std::int32_t, std::int32_t, std::int32_t, Handle*);
std::int32_t aoti_torch_create_tensor_from_blob(void*, std::int64_t, const std::int64_t*,
                                                const std::int64_t*, std::int64_t, std::int32_t,
                                                std::int32_t, std::int32_t, Handle*);
std::int32_t aoti_torch_delete_tensor_object(Handle);
std::int32_t aoti_torch_device_type_privateuse1();
std::int32_t aoti_torch_device_type_cpu();
std::int32_t aoti_torch_dtype_float32();
std::int32_t aoti_torch_create_cuda_stream_guard(void* stream, std::int32_t index, void** made);
std::int32_t aoti_torch_delete_cuda_stream_guard(void* guard);
void* simulated_workspace(void* stream, std::size_t* bytes);
}

namespace {

constexpr std::int64_t kWidth = 4;
constexpr std::size_t kBytes = kWidth * sizeof(float);

#ifdef ROW
constexpr std::int64_t kRow = ROW;
#else
constexpr std::int64_t kRow = kWidth;
#endif

thread_local std::string last_error;

#ifdef MIXED
constexpr std::size_t kConstants = 2;
#else
constexpr std::size_t kConstants = 1;
#endif

enum class State { none, initialized, folded };

struct Buffer {
  float* weight = nullptr;
  Handle tensor = nullptr;  // of that memory
  State state = State::none;
  float factor = 1;
  Handle factor_tensor = nullptr;
};

struct Container {
  std::int32_t device = 0;
  bool takes_from_host = true;
  std::array<Buffer, 2> buffers;
  int active = 0;
  int writes = 0;
  std::size_t instances = 1;
  std::atomic<std::size_t> free{1};
};

struct Product {
  float* y;
  const float* x;
  const float* w;
  float factor;
  std::int64_t rows;
  std::int64_t row = kWidth;  // from one row of x to the next
};

void multiply(void* argument) {
  const Product& product = *static_cast<Product*>(argument);
  for (std::int64_t i = 0; i < product.rows * kWidth; ++i) {
    product.y[i] =
        product.x[i / kWidth * product.row + i % kWidth] * product.w[i % kWidth] * product.factor;
  }
}

struct Write {
  float* to;
  const float* from;  // on the device, or null
  std::array<float, kWidth> values;
};

void write(void* argument) {
  const Write& write = *static_cast<Write*>(argument);
  std::memcpy(write.to, write.from != nullptr ? write.from : write.values.data(), kBytes);
}

template <typename Argument>
int launch(void* stream, void (*run)(void*), Argument argument, std::vector<sim_range> ranges) {
  sim_kernel kernel{};
  kernel.run = run;
  kernel.done = [](void* done) { delete static_cast<Argument*>(done); };
  kernel.argument = new Argument(argument);
  kernel.ranges = static_cast<int>(ranges.size());
  std::copy(ranges.begin(), ranges.end(), kernel.range);
  return sim_launch(static_cast<CUstream>(stream), &kernel);
}

std::int32_t check(int error, const char* what) {
  if (error == 0) return 0;
  const char* words = "";
  cuGetErrorString(error, &words);
  last_error = std::string(what) + ": " + words;
  return 1;
}

// As `RAII_gpuMalloc` does: before torch 2.13 its deleter throws where the device is lost, in a
// destructor.
std::int32_t release(const Container& container, Buffer& buffer) {
  int error = 0;
  if (buffer.tensor != nullptr)
    aoti_torch_delete_tensor_object(std::exchange(buffer.tensor, nullptr));
  if (buffer.weight != nullptr)
    error = sim_mfree(std::exchange(buffer.weight, nullptr), container.device);
#ifdef OLDER
  if (error != 0) std::abort();
#endif
  if (buffer.factor_tensor != nullptr)
    aoti_torch_delete_tensor_object(std::exchange(buffer.factor_tensor, nullptr));
  buffer.state = State::none;
  return check(error, "cudaFree");
}

std::int32_t fill(Container& container, Buffer& buffer, const float* from, bool on_device) {
  sim_runtime_call(container.device);
  if (buffer.weight == nullptr) {
    const std::int64_t size = kWidth;
    const std::int64_t stride = 1;
    buffer.weight = static_cast<float*>(sim_malloc(kBytes, container.device));
    if (buffer.weight == nullptr) return check(CUDA_ERROR_OUT_OF_MEMORY, "cudaMalloc");
    aoti_torch_create_tensor_from_blob(
        buffer.weight, 1, &size, &stride, 0, aoti_torch_dtype_float32(),
        aoti_torch_device_type_privateuse1(), container.device, &buffer.tensor);
  }
  buffer.state = State::initialized;
  Write job{buffer.weight, on_device ? from : nullptr, {}};
  std::vector<sim_range> ranges{{buffer.weight, kBytes, 1}};
  if (on_device) {
    ranges.push_back({from, kBytes, 0});
  } else {
    std::memcpy(job.values.data(), from, kBytes);
  }
  ++container.writes;
  int error = launch(nullptr, &write, job, ranges);
  if (error == 0 && !on_device) error = cuStreamSynchronize(nullptr);
  return check(error, "cudaMemcpy");
}

std::int32_t set_factor(Buffer& buffer, float value) {
  void* data = nullptr;
  if (buffer.factor_tensor == nullptr &&
      aoti_torch_empty_strided(0, nullptr, nullptr, aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, &buffer.factor_tensor)) {
    return 1;
  }
  aoti_torch_get_data_ptr(buffer.factor_tensor, &data);
  buffer.factor = *static_cast<float*>(data) = value;
  return 0;
}

struct Entry {
  const char* name;
  Handle handle;
};

std::int32_t update(Container* container, const Entry* entries, std::size_t count, bool inactive,
                    bool from_host) {
  for (std::size_t i = 0; i < count; ++i) {
    void* data = nullptr;
    std::int32_t type = 0;
    aoti_torch_get_data_ptr(entries[i].handle, &data);
    aoti_torch_get_device_type(entries[i].handle, &type);
    const bool on_device = type != aoti_torch_device_type_cpu();
    const int which = inactive ? 1 - container->active : container->active;
    const bool on_host = std::strcmp(entries[i].name, "f") == 0;
    if (on_host ? on_device : !on_device && !(from_host && container->takes_from_host)) {
      last_error = std::string("update_constant_buffer: constant '") + entries[i].name +
                   "' is on the wrong device";
      return 1;
    }
    if (on_host) {
      if (set_factor(container->buffers[which], *static_cast<float*>(data))) return 1;
      continue;
    }
    if (fill(*container, container->buffers[which], static_cast<float*>(data), on_device)) return 1;
  }
  return 0;
}

std::int32_t run_once(Container* container, Handle* inputs, Handle* outputs, void* stream) {
  void* guard = nullptr;
  void* x = nullptr;
  void* y = nullptr;
  std::int64_t* sizes = nullptr;
  std::int32_t type = 0;
  const Handle input = std::exchange(inputs[0], nullptr);
  aoti_torch_create_cuda_stream_guard(stream, container->device, &guard);
  aoti_torch_get_device_type(input, &type);
  aoti_torch_get_sizes(input, &sizes);
  aoti_torch_get_data_ptr(input, &x);
  const std::int64_t rows = sizes[0];
  const std::int64_t shape[] = {rows, kWidth};
  const std::int64_t strides[] = {kWidth, 1};
  const Buffer& buffer = container->buffers[container->active];
  const float* const w = buffer.weight;
  const std::size_t bytes = static_cast<std::size_t>(rows) * kBytes;
  const std::size_t read = static_cast<std::size_t>((rows - 1) * kRow + kWidth) * sizeof(float);
  std::int32_t status = 0;
  if (type != aoti_torch_device_type_privateuse1()) {
    last_error = "an input is not on the device";
    status = 1;
  } else if (aoti_torch_empty_strided(2, shape, strides, aoti_torch_dtype_float32(),
                                      aoti_torch_device_type_privateuse1(), container->device,
                                      &outputs[0])) {
    last_error = "aoti_torch_empty_strided(...) API call failed";
    status = 1;
  } else if (rows > 0) {
    aoti_torch_get_data_ptr(outputs[0], &y);
    const Product product{
        static_cast<float*>(y), static_cast<const float*>(x), w, buffer.factor, rows, kRow};
#ifdef CHAIN
    Handle between = nullptr;
    std::size_t work_bytes = 0;
    void* const work = simulated_workspace(stream, &work_bytes);
    void* z = nullptr;
    aoti_torch_empty_strided(2, shape, strides, aoti_torch_dtype_float32(),
                             aoti_torch_device_type_privateuse1(), container->device, &between);
    aoti_torch_get_data_ptr(between, &z);
    const Product first{static_cast<float*>(z), static_cast<const float*>(x), w, 1, rows, kRow};
    const Product second{static_cast<float*>(y), static_cast<const float*>(z), w, 1, rows};
    status = check(launch(stream, &multiply, first, {{z, bytes, 1}, {x, read, 0}, {w, kBytes, 0}}),
                   "launch");
    if (status == 0) {
      status = check(launch(stream, &multiply, second,
                            {{y, bytes, 1}, {z, bytes, 0}, {w, kBytes, 0}, {work, work_bytes, 1}}),
                     "launch");
    }
    aoti_torch_delete_tensor_object(between);
    if (status == 0 && rows == 13)
      status = check(cuStreamSynchronize(static_cast<CUstream>(stream)), "item");
    if (status == 0 && rows == 17 && sim_is_recording(static_cast<CUstream>(stream))) {
      last_error = "Attempt to increase offset for a CUDA generator not in capture mode.";
      status = 1;
    }
#else
    status =
        check(launch(stream, &multiply, product, {{y, bytes, 1}, {x, read, 0}, {w, kBytes, 0}}),
              "launch");
#endif
  }
#ifdef TWICE
  outputs[1] = outputs[0];
#endif
  aoti_torch_delete_tensor_object(input);
  aoti_torch_delete_cuda_stream_guard(guard);
  return status;
}

}  // namespace

extern "C" {

std::int32_t AOTInductorModelContainerCreateWithDevice(Container** made, std::size_t instances,
                                                       const char* device, const char* resources) {
  const std::string name = device;
  if (resources == nullptr) {
    last_error = "no directory with the kernels was given";
    return 1;
  }
  auto* container = new Container;
  container->instances = container->free = instances;
  container->takes_from_host = name.find(':') != std::string::npos;
  if (container->takes_from_host) container->device = std::stoi(name.substr(name.find(':') + 1));
  CUcontext context = nullptr;
  cuInit(0);
  cuDevicePrimaryCtxRetain(&context, container->device);
  cuCtxSetCurrent(context);
  const std::array<float, kWidth> ones{1, 1, 1, 1};
  if (fill(*container, container->buffers[0], ones.data(), false) ||
      (kConstants > 1 && set_factor(container->buffers[0], 1))) {
    delete container;
    return 1;
  }
  *made = container;
  return 0;
}

std::int32_t AOTInductorModelContainerDelete(Container* container) {
  sim_runtime_call(container->device);  // it unloads its kernels
  for (Buffer& buffer : container->buffers) release(*container, buffer);
  delete container;
  return 0;
}

std::int32_t AOTInductorModelContainerRun(Container* container, Handle* inputs, std::size_t,
                                          Handle* outputs, std::size_t, void* stream, void*) {
  if (sim_is_recording(static_cast<CUstream>(stream)))
    sim_fault("Run is recorded, which uses events and locks");
  container->buffers[container->active].state = State::folded;
  const std::int32_t status = run_once(container, inputs, outputs, stream);
  const std::size_t before = container->free;
  container->free = (before > 0 ? before : container->instances) - 1;
  return status;
}

std::int32_t AOTInductorModelContainerRunSingleThreaded(Container* container, Handle* inputs,
                                                        std::size_t, Handle* outputs, std::size_t,
                                                        void* stream, void*) {
  if (container->free == 0) sim_fault("RunSingleThreaded takes an instance, and none is free");
  State& state = container->buffers[container->active].state;
  if (state == State::initialized) {
    state = State::folded;
#ifdef OLDER
  } else if (container->buffers[0].state != State::folded) {
    last_error = "Unknown constant state";
    return 1;
#endif
  }
  return run_once(container, inputs, outputs, stream);
}

std::int32_t AOTInductorModelContainerGetNumInputs(Container*, std::size_t* count) {
  *count = 1;
  return 0;
}
std::int32_t AOTInductorModelContainerGetInputName(Container*, std::size_t, const char** name) {
  *name = "x";
  return 0;
}
std::int32_t AOTInductorModelContainerGetNumOutputs(Container*, std::size_t* count) {
#ifdef TWICE
  *count = 2;
#else
  *count = 1;
#endif
  return 0;
}
std::int32_t AOTInductorModelContainerGetOutputName(Container*, std::size_t, const char** name) {
  *name = "y";
  return 0;
}
std::int32_t AOTInductorModelContainerGetCallSpec(Container*, const char** in, const char** out) {
  *in = R"([1, {"type": "builtins.tuple", "context": "null", "children_spec": )"
        R"([{"type": "builtins.tuple", "context": "null", "children_spec": )"
        R"([{"type": null, "context": null, "children_spec": []}]})"
        R"(, {"type": "builtins.dict", "context": "[]", "children_spec": []}]}])";
  *out = R"([1, {"type": null, "context": null, "children_spec": []}])";
  return 0;
}
std::int32_t AOTInductorModelContainerGetNumConstants(Container*, std::size_t* count) {
  *count = kConstants;
  return 0;
}
std::int32_t AOTInductorModelContainerGetConstantName(Container*, std::size_t index,
                                                      const char** name) {
  *name = index == 0 ? "w" : "f";
  return 0;
}
std::int32_t AOTInductorModelContainerGetConstantOriginalFQN(Container*, std::size_t index,
                                                             const char** name) {
  *name = index == 0 ? "weight" : "factor";
  return 0;
}
std::int32_t AOTInductorModelContainerGetConstantDtype(Container*, std::size_t,
                                                       std::int32_t* dtype) {
  *dtype = aoti_torch_dtype_float32();
  return 0;
}
std::int32_t AOTInductorModelContainerGetConstantFromFolded(Container*, std::size_t, bool* folded) {
  *folded = false;
  return 0;
}
std::int32_t AOTInductorModelContainerGetConstantType(Container*, std::size_t, std::int32_t* type) {
  *type = 1;  // a parameter
  return 0;
}
std::int32_t AOTInductorModelContainerGetConstantDataSize(Container*, std::size_t index,
                                                          std::size_t* bytes) {
  *bytes = index == 0 ? kBytes : sizeof(float);
  return 0;
}
#ifdef OLDER
using Map = std::unordered_map<std::string, Handle>;

std::int32_t AOTInductorModelContainerExtractConstantsMap(Container* container, Map* map,
                                                          bool inactive) {
  const Buffer& buffer = container->buffers[inactive ? 1 - container->active : container->active];
  if (buffer.tensor == nullptr) return 0;
  map->emplace("weight", buffer.tensor);
  if (kConstants > 1) map->emplace("factor", buffer.factor_tensor);
  return 0;
}
std::int32_t AOTInductorModelContainerUpdateConstantBuffer(Container* container, const Map* map,
                                                           bool inactive, bool) {
  std::vector<Entry> entries;
  for (const auto& [name, handle] : *map) entries.push_back({name.c_str(), handle});
  return update(container, entries.data(), entries.size(), inactive, false);
}
#else
std::int32_t AOTInductorModelContainerExtractConstantsMapEntries(Container* container,
                                                                 const Entry** entries,
                                                                 std::size_t* count,
                                                                 bool inactive) {
  thread_local std::array<Entry, 2> extracted{};
  const Buffer& buffer = container->buffers[inactive ? 1 - container->active : container->active];
  extracted = {Entry{"weight", buffer.tensor}, Entry{"factor", buffer.factor_tensor}};
  *entries = extracted.data();
  *count = buffer.tensor != nullptr ? kConstants : 0;
  return 0;
}
std::int32_t AOTInductorModelContainerUpdateConstantBufferPairs(Container* container,
                                                                const Entry* entries,
                                                                std::size_t count, bool inactive,
                                                                bool) {
  return update(container, entries, count, inactive, false);
}
std::int32_t AOTInductorModelContainerUpdateConstantBufferFromCpuPairs(Container* container,
                                                                       const Entry* entries,
                                                                       std::size_t count,
                                                                       bool inactive, bool) {
  return update(container, entries, count, inactive, true);
}
#endif
std::int32_t AOTInductorModelContainerRunConstantFolding(Container* container, bool inactive, void*,
                                                         void*) {
  sim_runtime_call(container->device);
  container->buffers[inactive ? 1 - container->active : container->active].state = State::folded;
  return 0;
}
std::int32_t AOTInductorModelContainerSwapConstantBuffer(Container* container) {
  container->active = 1 - container->active;
  return 0;
}
std::int32_t AOTInductorModelContainerFreeInactiveConstantBuffer(Container* container) {
  sim_runtime_call(container->device);
  return release(*container, container->buffers[1 - container->active]);
}
#ifndef OLDER
std::int32_t AOTInductorGetLastError(const char** text) {
  *text = last_error.c_str();
  return 0;
}
#endif
}
