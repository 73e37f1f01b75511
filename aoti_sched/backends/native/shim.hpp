// Torch's C functions for tensors, as pointers. Its shim.h names them aoti_torch_<name>.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "handle.hpp"

namespace aoti {

struct Shim {
  std::int32_t (*get_data_ptr)(BorrowedHandle, void**) = nullptr;
  std::int32_t (*get_dim)(BorrowedHandle, std::int64_t*) = nullptr;
  std::int32_t (*get_sizes)(BorrowedHandle, std::int64_t**) = nullptr;
  std::int32_t (*get_strides)(BorrowedHandle, std::int64_t**) = nullptr;
  std::int32_t (*get_dtype)(BorrowedHandle, std::int32_t*) = nullptr;
  std::size_t (*dtype_element_size)(std::int32_t dtype) = nullptr;
  std::int32_t (*empty_strided)(std::int64_t dims, const std::int64_t* sizes,
                                const std::int64_t* strides, std::int32_t dtype,
                                std::int32_t device_type, std::int32_t device_index,
                                Handle* made) = nullptr;
  std::int32_t (*reinterpret_tensor)(BorrowedHandle, std::int64_t dims, const std::int64_t* sizes,
                                     const std::int64_t* strides, std::int64_t offset,
                                     Handle* made) = nullptr;
  std::int32_t (*clone)(BorrowedHandle, Handle* made) = nullptr;
  DeleteFunction delete_tensor = nullptr;
  std::int32_t cpu = 0;  // torch's number for this kind of device
};

// One of torch's functions failed. The text is the one that models have for it; torch's own says
// why.
struct TorchRefused : std::runtime_error {
  explicit TorchRefused(const std::string& function)
      : std::runtime_error("aoti_torch_" + function + "() API call failed") {}
};

// Throws TorchRefused unless the status is 0.
inline void check_torch(std::int32_t status, const char* function) {
  if (status != 0) throw TorchRefused(function);
}

}  // namespace aoti
