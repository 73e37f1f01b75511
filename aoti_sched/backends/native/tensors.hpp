// Tensors of Python as handles, and handles as tensors of Python. Both ways need the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "lane.hpp"

namespace aoti {

// Torch's own way leads through lists of capsules, which costs more than all the rest of a hand-over. Where torch has
// the two functions by which C++ can do without, they are used instead.
class Tensors {
 public:
  using NewHandle = std::int32_t (*)(Handle tensor, Handle* made);  // aoti_torch_new_tensor_handle
  using Wrap = PyObject* (*)(Handle tensor);                        // THPVariable_Wrap(const at::TensorBase&)

  // `type` is torch.Tensor; the functions are torch's for lists. The pointers may be null, but only both.
  Tensors(nanobind::object type, nanobind::object to_capsules, nanobind::object from_capsules, NewHandle new_handle,
          Wrap wrap);

  // A new handle for each tensor of a list or tuple of `count`; throws when it is none, and then none is made.
  std::vector<Handle> handles_of(nanobind::handle tensors, std::size_t count, const Runtime& runtime) const;

  // A list of the handles' tensors, None where one is null. The handles are gone afterwards, whatever happens.
  nanobind::object tensors_of(std::vector<Handle>& handles, const Runtime& runtime) const;

  // Torch's own tensor in each of Python's, of lists or tuples of `count` each, one list after the other. No handles are
  // made: the tensors live as long as the tuple of them that is returned, whatever becomes of the lists.
  nanobind::object borrow(nanobind::handle lists, std::size_t count, std::vector<Handle>& borrowed) const;

  // A list of so many lists, which share the handles' tensors evenly. The handles are gone afterwards.
  nanobind::object lists_of(std::vector<Handle>& handles, std::size_t lists, const Runtime& runtime) const;

 private:
  void* address_of(PyObject* tensor) const;

  nanobind::object type_;
  nanobind::object to_capsules_;
  nanobind::object from_capsules_;
  nanobind::object address_;  // the name of a tensor's attribute
  NewHandle new_handle_;
  Wrap wrap_;
};

}  // namespace aoti
