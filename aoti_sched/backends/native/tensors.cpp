#include "tensors.hpp"

#include <stdexcept>
#include <utility>

namespace nb = nanobind;

namespace aoti {

Tensors::Tensors(nb::object type, nb::object to_capsules, nb::object from_capsules,
                 NewHandle new_handle, Wrap wrap)
    : type_(std::move(type)),
      to_capsules_(std::move(to_capsules)),
      from_capsules_(std::move(from_capsules)),
      address_(nb::steal(PyUnicode_InternFromString("_cdata"))),
      new_handle_(new_handle),
      wrap_(wrap) {
  if ((new_handle == nullptr) != (wrap == nullptr)) {
    throw std::invalid_argument("new_handle and wrap: both or none");
  }
}

namespace {

// Returns the items of a list or tuple of `count`.
nb::object items_of(nb::handle sequence, std::size_t count) {
  nb::object fast = nb::steal(PySequence_Fast(sequence.ptr(), "the inputs are no sequence"));
  if (!fast.is_valid()) throw nb::python_error();
  if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr())) != count) {
    // The runtime would throw across its C boundary for this.
    throw std::invalid_argument("wrong number of inputs");
  }
  return fast;
}

PyObject* item(const nb::object& fast, std::size_t index) {
  return PySequence_Fast_GET_ITEM(fast.ptr(), static_cast<Py_ssize_t>(index));
}

}  // namespace

void* Tensors::address_of(PyObject* tensor) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != type_.ptr()) {
    const int is_tensor = PyObject_IsInstance(tensor, type_.ptr());
    if (is_tensor < 0) throw nb::python_error();
    if (is_tensor == 0) throw nb::type_error("an input is no tensor");
  }
  const nb::object address = nb::steal(PyObject_GetAttr(tensor, address_.ptr()));
  if (!address.is_valid()) throw nb::python_error();
  void* const pointer = PyLong_AsVoidPtr(address.ptr());
  if (pointer == nullptr) throw nb::type_error("an input has no memory of a tensor");
  return pointer;
}

OwnedHandles Tensors::from_python(nb::handle tensors, std::size_t count,
                                  DeleteFunction free) const {
  const nb::object fast = items_of(tensors, count);
  OwnedHandles handles(free, count);
  if (new_handle_ == nullptr) {
    const nb::object capsules = to_capsules_(fast);
    std::size_t taken = 0;
    const auto take = [&](std::size_t i) {
      const nb::object capsule =
          nb::steal(PySequence_GetItem(capsules.ptr(), static_cast<Py_ssize_t>(i)));
      Handle* const place = handles.receive(i);
      if (capsule.is_valid()) *place = PyCapsule_GetPointer(capsule.ptr(), nullptr);
      return *place != nullptr;
    };
    while (taken < count && take(taken)) ++taken;
    if (taken == count) return handles;
    nb::python_error error;
    for (++taken; taken < count; ++taken) {  // the handles of the other capsules are ours to free
      if (!take(taken)) PyErr_Clear();
    }
    throw error;
  }
  for (std::size_t i = 0; i < count; ++i) {
    void* tensor = address_of(item(fast, i));  // a tensor of C++ is one pointer to this memory
    if (new_handle_(&tensor, handles.receive(i)) == 0) continue;
    throw std::runtime_error("torch made no handle for an input");
  }
  return handles;
}

nb::object Tensors::borrow(nb::handle lists, std::size_t count,
                           std::vector<BorrowedHandle>& borrowed) const {
  const nb::object outer = nb::steal(PySequence_Fast(lists.ptr(), "the members are no sequence"));
  if (!outer.is_valid()) throw nb::python_error();
  const auto members = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(outer.ptr()));
  nb::object tensors = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(members * count)));
  if (!tensors.is_valid()) throw nb::python_error();
  borrowed.resize(members * count);
  for (std::size_t member = 0, next = 0; member < members; ++member) {
    const nb::object fast = items_of(item(outer, member), count);
    for (std::size_t i = 0; i < count; ++i, ++next) {
      PyObject* const tensor = item(fast, i);
      PyTuple_SET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(next),
                       nb::borrow(tensor).release().ptr());
      borrowed[next] = address_of(tensor);
    }
  }
  return tensors;
}

nb::object Tensors::to_python(OwnedHandles handles) const {
  if (wrap_ == nullptr) {
    nb::list capsules;
    for (const BorrowedHandle handle : handles) {
      if (handle == nullptr) continue;
      nb::object capsule = nb::steal(PyCapsule_New(handle, nullptr, nullptr));
      if (!capsule.is_valid()) throw nb::python_error();
      capsules.append(std::move(capsule));
    }
    const std::vector<Handle> given =
        handles.release();  // torch takes all handles, or none is left
    const nb::object made = from_capsules_(capsules);
    if (capsules.size() == given.size()) return made;
    nb::list tensors;
    std::size_t next = 0;
    for (const Handle handle : given) {
      tensors.append(handle == nullptr ? nb::none() : nb::object(made[next++]));
    }
    return tensors;
  }
  nb::object tensors = nb::steal(PyList_New(static_cast<Py_ssize_t>(handles.size())));
  if (!tensors.is_valid()) throw nb::python_error();
  bool failed = false;
  for (std::size_t i = 0; i < handles.size(); ++i) {
    PyObject* tensor = nullptr;
    if (handles[i] == nullptr) {
      tensor = nb::none().release().ptr();
    } else {
      const OwnedHandle handle = handles.exchange(i);
      try {
        if (!failed) tensor = wrap_(handle.get());
      } catch (...) {
        // Torch's own type, thrown when Python has the error already.
        failed = true;
      }
      failed = failed || tensor == nullptr;
    }
    PyList_SET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i), tensor);
  }
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  if (failed) throw std::runtime_error("torch made no tensor of an output");
  return tensors;
}

nb::object Tensors::to_lists(OwnedHandles handles, std::size_t lists) const {
  const std::size_t each = handles.size() / lists;
  const nb::object tensors = to_python(std::move(handles));
  nb::list made;
  for (std::size_t list = 0; list < lists; ++list) {
    made.append(nb::steal(PyList_GetSlice(tensors.ptr(), static_cast<Py_ssize_t>(list * each),
                                          static_cast<Py_ssize_t>((list + 1) * each))));
  }
  return made;
}

}  // namespace aoti
