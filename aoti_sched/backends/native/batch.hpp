// Batches: the inputs of several requests become the inputs of one run, and its outputs become each
// request's own rows.
//
// Nothing here knows torch or Python: torch's functions arrive as pointers. Sizes and strides are
// read from each tensor again, so that no memory outside a tensor is read or written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "handle.hpp"
#include "shim.hpp"

namespace aoti {

// How the members' inputs become one input: rows one after the other along `dim`.
struct InputPlan {
  std::size_t dim = 0;
  std::vector<std::size_t> order;            // of the dimensions in memory, outermost first
  std::vector<std::size_t> ragged;           // dimensions that are padded to the longest member's
  std::map<std::int32_t, std::string> pads;  // the bytes of one padding element, by dtype
};

// A dimension of an output that is cut back to the size of an input's dimension, of the same
// member.
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
  // Throws std::invalid_argument for a plan without meaning.
  Plan(Shim shim, std::vector<InputPlan> inputs, std::vector<OutputPlan> outputs, bool detach_rows);

  const Shim shim;
  const std::vector<InputPlan> inputs;
  const std::vector<OutputPlan> outputs;
  const bool detach_rows;  // members get copies instead of views
};

// The memory in which a slot's batches are put together. One batch at a time uses it; the next one
// uses it again.
class Staging {
 public:
  struct Memory {
    OwnedHandle tensor;  // of one dimension
    char* data = nullptr;
    std::int64_t elements = 0;
    std::int64_t bytes = 0;
    std::int32_t dtype = 0;
  };

  // Returns memory for `elements` of an input, and makes it where there is too little. Throws
  // TorchRefused.
  const Memory& reserve(const Shim& shim, std::size_t input, std::int64_t elements,
                        std::int32_t dtype);

  // Gives the memory at this address up: an output shares it.
  void give_up(const void* data);

 private:
  std::vector<Memory> memories_;  // one for each input
};

struct Batch {
  // Throws std::invalid_argument when the rows don't fit.
  Batch(std::shared_ptr<const Plan> plan, std::shared_ptr<Staging> staging,
        std::vector<BorrowedHandle> tensors, std::vector<std::int64_t> rows,
        std::int64_t padded_rows);

  std::shared_ptr<const Plan> plan;
  std::shared_ptr<Staging> staging;
  // Each member's inputs, member after member, as pointers to torch's own tensors (a handle is the
  // address of such a pointer). The submitter keeps the tensors alive until the batch is over.
  std::vector<BorrowedHandle> tensors;
  std::vector<std::int64_t> rows;  // of each member
  std::int64_t padded_rows;        // of the run
};

// Puts the members together. Returns a handle for each input: a view of the staging memory.
[[nodiscard]] OwnedHandles gather(Batch& batch);

// Takes the outputs apart. Returns a handle for each member's part of each output, member after
// member; null where the model left an output out.
[[nodiscard]] OwnedHandles split(Batch& batch, const OwnedHandles& outputs);

}  // namespace aoti
