// Tensors of Python as handles, and handles as tensors of Python. Both ways need the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "handle.hpp"

namespace aoti {

// Torch's own way leads through lists of capsules, which costs more than the rest of a hand-over.
// Where torch has the two functions by which C++ can do without lists, they are used instead.
class Tensors {
 public:
  using NewHandle = std::int32_t (*)(BorrowedHandle tensor,
                                     Handle* made);   // aoti_torch_new_tensor_handle
  using Wrap = PyObject* (*)(BorrowedHandle tensor);  // THPVariable_Wrap(const at::TensorBase&)

  // type: torch.Tensor.
  // to_capsules, from_capsules: Torch's functions for lists.
  // new_handle, wrap: Both, or both null.
  Tensors(nanobind::object type, nanobind::object to_capsules, nanobind::object from_capsules,
          NewHandle new_handle, Wrap wrap);

  // Makes a handle for each tensor of a list or tuple of `count`. When it throws, no handle is
  // left.
  [[nodiscard]] OwnedHandles from_python(nanobind::handle tensors, std::size_t count,
                                         DeleteFunction free) const;

  // Makes a list of the handles' tensors, None where a handle is null.
  [[nodiscard]] nanobind::object to_python(OwnedHandles handles) const;

  // Makes a list of `lists` lists, which share the handles' tensors evenly.
  [[nodiscard]] nanobind::object to_lists(OwnedHandles handles, std::size_t lists) const;

  // Finds torch's own tensor in each of Python's, of lists or tuples of `count` each, one list
  // after the other. No handles are made: the tensors live as long as the tuple of them that is
  // returned, even when the lists change.
  [[nodiscard]] nanobind::object borrow(nanobind::handle lists, std::size_t count,
                                        std::vector<BorrowedHandle>& borrowed) const;

 private:
  [[nodiscard]] void* address_of(PyObject* tensor) const;

  nanobind::object type_;
  nanobind::object to_capsules_;
  nanobind::object from_capsules_;
  nanobind::object address_;  // the name of a tensor's attribute
  NewHandle new_handle_;
  Wrap wrap_;
};

}  // namespace aoti
