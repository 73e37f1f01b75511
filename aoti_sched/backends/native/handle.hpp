// What stands for a tensor here, and the outputs of a run that are one tensor.
#pragma once

#include <cstddef>
#include <vector>

namespace aoti {

using Handle = void*;  // AtenTensorHandle

// An output that is the same tensor as an earlier one.
struct Alias {
  std::size_t output;
  std::size_t of;
};

// Leaves each handle in its first place only, so that each is owned once; null stands in the other places, which are
// returned. Models write the handle of one tensor into every output that the tensor is.
std::vector<Alias> take_aliases(std::vector<Handle>& handles);

}  // namespace aoti
