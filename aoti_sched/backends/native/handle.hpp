// Tensor handles and their owners.
//
// A handle owns one reference to a tensor. `OwnedHandle` and `OwnedHandles` free theirs when they
// are destroyed; a `BorrowedHandle` is kept alive by another owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace aoti {

using Handle = void*;           // AtenTensorHandle, as torch's C functions take and give it
using BorrowedHandle = Handle;  // owned elsewhere for as long as it is used
using DeleteFunction = std::int32_t (*)(Handle);  // aoti_torch_delete_tensor_object

// Owns one handle, or none.
class OwnedHandle {
 public:
  OwnedHandle() = default;
  explicit OwnedHandle(DeleteFunction free, Handle handle = nullptr) noexcept
      : free_(free), handle_(handle) {}
  OwnedHandle(OwnedHandle&& other) noexcept : free_(other.free_), handle_(other.release()) {}
  OwnedHandle& operator=(OwnedHandle&& other) noexcept {
    if (this == &other) return *this;
    reset();
    free_ = other.free_;
    handle_ = other.release();
    return *this;
  }
  OwnedHandle(const OwnedHandle&) = delete;
  OwnedHandle& operator=(const OwnedHandle&) = delete;
  ~OwnedHandle() { reset(); }

  explicit operator bool() const noexcept { return handle_ != nullptr; }
  [[nodiscard]] BorrowedHandle get() const noexcept { return handle_; }
  [[nodiscard]] Handle release() noexcept { return std::exchange(handle_, nullptr); }
  void reset() noexcept {
    if (handle_ != nullptr) free_(release());
  }
  // Where a C function writes the handle that it makes.
  [[nodiscard]] Handle* receive() noexcept {
    reset();
    return &handle_;
  }

 private:
  DeleteFunction free_ = nullptr;
  Handle handle_ = nullptr;
};

// Owns a list of handles, some of which may be null. The handles lie side by side, as a model's
// `Run` takes its inputs: `Run` writes null over each input that it steals.
class OwnedHandles {
 public:
  OwnedHandles() = default;
  explicit OwnedHandles(DeleteFunction free, std::size_t count = 0)
      : free_(free), handles_(count, nullptr) {}
  // Adopts handles that each stand in the list once.
  OwnedHandles(DeleteFunction free, std::vector<Handle>&& handles) noexcept
      : free_(free), handles_(std::move(handles)) {}
  OwnedHandles(OwnedHandles&& other) noexcept
      : free_(other.free_), handles_(std::exchange(other.handles_, {})) {}
  OwnedHandles& operator=(OwnedHandles&& other) noexcept {
    if (this == &other) return *this;
    reset();
    free_ = other.free_;
    handles_ = std::exchange(other.handles_, {});
    return *this;
  }
  OwnedHandles(const OwnedHandles&) = delete;
  OwnedHandles& operator=(const OwnedHandles&) = delete;
  ~OwnedHandles() { reset(); }

  [[nodiscard]] std::size_t size() const noexcept { return handles_.size(); }
  [[nodiscard]] BorrowedHandle operator[](std::size_t index) const { return handles_[index]; }
  [[nodiscard]] auto begin() const noexcept { return handles_.begin(); }
  [[nodiscard]] auto end() const noexcept { return handles_.end(); }
  // The handles as a C function takes, steals or makes them.
  [[nodiscard]] Handle* data() noexcept { return handles_.data(); }

  // Takes the handle even if there is no memory for it: then the handle is freed.
  void push_back(OwnedHandle handle) {
    handles_.push_back(handle.get());
    static_cast<void>(handle.release());
  }
  // Puts a handle in a place and returns the one that was there.
  [[nodiscard]] OwnedHandle exchange(std::size_t index, OwnedHandle next = OwnedHandle()) noexcept {
    return OwnedHandle(free_, std::exchange(handles_[index], next.release()));
  }
  // Where a C function writes the handle that it makes.
  [[nodiscard]] Handle* receive(std::size_t index) noexcept {
    static_cast<void>(exchange(index));
    return &handles_[index];
  }
  // Gives all handles away.
  [[nodiscard]] std::vector<Handle> release() noexcept { return std::exchange(handles_, {}); }
  // Frees all handles. Their places stay, and are null.
  void reset() noexcept {
    for (Handle& handle : handles_) {
      if (handle != nullptr) free_(std::exchange(handle, nullptr));
    }
  }

 private:
  DeleteFunction free_ = nullptr;
  std::vector<Handle> handles_;
};

// An output that is the same tensor as an earlier output.
struct Alias {
  std::size_t output;
  std::size_t of;
};

// Leaves each handle in its first place only and returns the other places, which become null.
// Models write the handle of one tensor into every output that the tensor is.
[[nodiscard]] std::vector<Alias> take_aliases(OwnedHandles& handles);

}  // namespace aoti
