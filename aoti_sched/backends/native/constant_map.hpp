// A map of constants as models compiled before torch 2.13 take and give it.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "handle.hpp"

// The compiled models' code reads and fills this very map, so its std::string must be theirs.
// Torch's wheels have the new one since 2.6; a module built with the old one has no maps.
#if !defined(_GLIBCXX_USE_CXX11_ABI) || _GLIBCXX_USE_CXX11_ABI
#define AOTI_CONSTANT_MAPS

namespace aoti {

// Names and handles. The handles stay their owners'.
class ConstantMap {
 public:
  using Pairs = std::vector<std::pair<std::string, std::uintptr_t>>;

  explicit ConstantMap(const Pairs& pairs) {
    for (const auto& [name, handle] : pairs) {
      map_.emplace(name, reinterpret_cast<BorrowedHandle>(handle));
    }
  }

  [[nodiscard]] std::uintptr_t address() { return reinterpret_cast<std::uintptr_t>(&map_); }

  [[nodiscard]] Pairs pairs() const {
    Pairs pairs;
    for (const auto& [name, handle] : map_) {
      pairs.emplace_back(name, reinterpret_cast<std::uintptr_t>(handle));
    }
    return pairs;
  }

 private:
  std::unordered_map<std::string, BorrowedHandle> map_;
};

}  // namespace aoti

#endif
