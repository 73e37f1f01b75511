// Batches: the inputs of several requests become one run's, and its outputs become each request's own rows.
//
// As the lanes, this knows neither torch nor Python: torch's functions arrive as pointers. What it is told of a tensor
// it asks the tensor for again, so that nothing outside a tensor's memory is ever read or written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "handle.hpp"

namespace aoti {

// Torch's C functions by which tensors are looked at, made and viewed; its shim.h calls them aoti_torch_<name>.
struct Shim {
  std::int32_t (*get_data_ptr)(Handle, void**) = nullptr;
  std::int32_t (*get_dim)(Handle, std::int64_t*) = nullptr;
  std::int32_t (*get_sizes)(Handle, std::int64_t**) = nullptr;
  std::int32_t (*get_strides)(Handle, std::int64_t**) = nullptr;
  std::int32_t (*get_dtype)(Handle, std::int32_t*) = nullptr;
  std::size_t (*dtype_element_size)(std::int32_t dtype) = nullptr;
  std::int32_t (*empty_strided)(std::int64_t dims, const std::int64_t* sizes, const std::int64_t* strides,
                                std::int32_t dtype, std::int32_t device_type, std::int32_t device_index,
                                Handle* made) = nullptr;
  std::int32_t (*reinterpret_tensor)(Handle, std::int64_t dims, const std::int64_t* sizes,
                                     const std::int64_t* strides, std::int64_t offset, Handle* made) = nullptr;
  std::int32_t (*clone)(Handle, Handle* made) = nullptr;
  std::int32_t (*delete_tensor)(Handle) = nullptr;
  std::int32_t cpu = 0;  // torch's number for this kind of device
};

// One of the functions above refused. In the words that models have for it: torch's own say why.
struct TorchRefused : std::runtime_error {
  explicit TorchRefused(const std::string& function)
      : std::runtime_error("aoti_torch_" + function + "() API call failed") {}
};

// How one input of all members becomes one: rows one after the other along `dim`.
struct InputPlan {
  std::size_t dim = 0;
  std::vector<std::size_t> order;            // of the dimensions in memory, outermost first
  std::vector<std::size_t> ragged;           // dimensions that are padded to the longest member's
  std::map<std::int32_t, std::string> pads;  // what they are padded with: one element's bytes, by dtype
};

// A dimension of an output is as long as one of an input of the same member, and is cut back to it.
struct RaggedOut {
  std::size_t dim = 0;
  std::size_t input = 0;
  std::size_t input_dim = 0;
};

struct OutputPlan {
  std::size_t dim = 0;
  std::vector<RaggedOut> ragged;
};

struct Plan {
  // Throws std::invalid_argument for what means nothing.
  Plan(Shim shim, std::vector<InputPlan> inputs, std::vector<OutputPlan> outputs, bool detach_rows);

  const Shim shim;
  const std::vector<InputPlan> inputs;
  const std::vector<OutputPlan> outputs;
  const bool detach_rows;  // members get copies in the place of views
};

// Where a slot's batches are put together. It is kept for the next batch, and used by one at a time.
class Staging {
 public:
  struct Memory {
    Handle tensor = nullptr;  // of one dimension
    char* data = nullptr;
    std::int64_t elements = 0;
    std::int64_t bytes = 0;
    std::int32_t dtype = 0;
  };

  Staging() = default;
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Memory for an input of so many elements: what is there, if it is enough. Throws TorchRefused.
  const Memory& of(const Shim& shim, std::size_t input, std::int64_t elements, std::int32_t dtype);

  // Leaves to a tensor what it shares of this memory.
  void give_up(const void* data);

 private:
  static void free(Memory& memory);

  std::int32_t (*delete_tensor_)(Handle) = nullptr;
  std::vector<Memory> memories_;  // one for each input
};

struct Batch {
  // Throws std::invalid_argument when the rows don't fit.
  Batch(std::shared_ptr<const Plan> plan, Staging* staging, std::vector<Handle> tensors, std::vector<std::int64_t> rows,
        std::int64_t padded_rows);

  std::shared_ptr<const Plan> plan;
  Staging* staging;
  // Each member's inputs, member after member, as pointers to torch's own tensors (of which a handle is the address).
  // Somebody else keeps them alive until the batch is over.
  std::vector<Handle> tensors;
  std::vector<std::int64_t> rows;  // of each member
  std::int64_t padded_rows;        // of the run
};

// Puts the members together: a handle for each input, which is a view of the staging memory. When it throws, what was
// made is in `inputs`.
void gather(Batch& batch, std::vector<Handle>& inputs);

// Takes the outputs apart: a handle of its own for each member's part of each output, member after member, null where
// the model left an output out. When it throws, what was made is in `parts`.
void split(Batch& batch, const std::vector<Handle>& outputs, std::vector<Handle>& parts);

}  // namespace aoti
