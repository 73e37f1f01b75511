// Torch and a device as the lanes see them, played by the C libraries beside this file.
#pragma once

#include <memory>

#include "lane.hpp"
#include "model_library.h"
#include "simulated_cuda.h"

namespace scripted {

// Sets a pointer of C++ types to a function of the C libraries, which take plain pointers.
template <typename Function, typename Given>
void set(Function& function, Given given) {
  function = reinterpret_cast<Function>(given);
}

inline aoti::Shim shim() {
  aoti::Shim made;
  set(made.get_data_ptr, &torch_get_data_ptr);
  set(made.get_dim, &torch_get_dim);
  set(made.get_sizes, &torch_get_sizes);
  set(made.get_strides, &torch_get_strides);
  set(made.get_dtype, &torch_get_dtype);
  set(made.dtype_element_size, &torch_dtype_element_size);
  set(made.empty_strided, &torch_empty_strided);
  set(made.reinterpret_tensor, &torch_reinterpret_tensor);
  set(made.clone, &torch_clone);
  set(made.delete_tensor, &torch_delete_tensor);
  made.cpu = ON_HOST;
  return made;
}

inline aoti::Runtime runtime() {
  aoti::Runtime made;
  made.delete_tensor = &torch_delete_tensor;
  made.root_cause = &torch_root_cause;
  made.get_threads = &torch_get_threads;
  made.set_omp_threads = &torch_set_omp_threads;
  made.set_mkl_threads = &torch_set_mkl_threads;
  made.new_handle = &torch_another_handle;
  return made;
}

// The simulated CUDA device.
inline std::shared_ptr<const aoti::Device> device(CUcontext context, bool one_at_a_time = false) {
  auto made = std::make_shared<aoti::Device>();
  made->shim = shim();
  set(made->new_handle, &torch_new_handle_of);
  set(made->get_device_type, &torch_get_device_type);
  set(made->copy, &torch_copy);
  set(made->guard, &torch_guard_stream);
  set(made->unguard, &torch_unguard_stream);
  set(made->record_use, &torch_record_use);
  made->type = ON_DEVICE;
  made->one_at_a_time = one_at_a_time;
  made->driver.context = context;
  made->driver.not_ready = CUDA_ERROR_NOT_READY;
  set(made->driver.get_context, &cuCtxGetCurrent);
  set(made->driver.set_context, &cuCtxSetCurrent);
  set(made->driver.exchange_capture_mode, &cuThreadExchangeStreamCaptureMode);
  set(made->driver.query, &cuStreamQuery);
  set(made->driver.is_capturing, &cuStreamIsCapturing);
  set(made->driver.make_event, &cuEventCreate);
  set(made->driver.destroy_event, &cuEventDestroy_v2);
  set(made->driver.wait_for_event, &cuStreamWaitEvent);
  set(made->driver.record_event, &cuEventRecord);
  set(made->driver.query_event, &cuEventQuery);
  set(made->driver.take_last_error, &cudaGetLastError);
  set(made->driver.copy_in, &cuMemcpyHtoDAsync_v2);
  set(made->driver.copy_out, &cuMemcpyDtoHAsync_v2);
  set(made->driver.allocate_host, &cuMemAllocHost_v2);
  set(made->driver.free_host, &cuMemFreeHost);
  set(made->driver.explain, &cuGetErrorString);
  return made;
}

}  // namespace scripted
