#include "handle.hpp"

#include <algorithm>
#include <functional>
#include <new>
#include <numeric>

namespace aoti {

namespace {

constexpr std::size_t kFew =
    32;  // up to this count, comparing all handles is cheaper than sorting them

std::vector<Alias> find_aliases(const OwnedHandles& handles) {
  std::vector<Alias> aliases;
  if (handles.size() <= kFew) {
    for (std::size_t output = 1; output < handles.size(); ++output) {
      if (handles[output] == nullptr) continue;
      const auto end = handles.begin() + static_cast<std::ptrdiff_t>(output);
      const auto first = std::find(handles.begin(), end, *end);
      if (first == end) continue;
      aliases.push_back({output, static_cast<std::size_t>(first - handles.begin())});
    }
    return aliases;
  }
  std::vector<std::size_t> order(handles.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t one, std::size_t other) {
    return std::less<>()(handles[one], handles[other]);
  });
  std::size_t first = order[0];
  for (const std::size_t output : order) {
    if (output == first) continue;
    if (handles[output] == nullptr || handles[output] != handles[first]) {
      first = output;
    } else {
      aliases.push_back({output, first});
    }
  }
  return aliases;
}

}  // namespace

std::vector<Alias> take_aliases(OwnedHandles& handles) {
  std::vector<Alias> aliases;
  try {
    aliases = find_aliases(handles);
  } catch (const std::bad_alloc&) {  // the other places are lost, but no handle is freed twice
    for (std::size_t output = 1; output < handles.size(); ++output) {
      const auto end = handles.begin() + static_cast<std::ptrdiff_t>(output);
      if (std::find(handles.begin(), end, *end) != end) handles.data()[output] = nullptr;
    }
    throw;
  }
  for (const Alias& alias : aliases) handles.data()[alias.output] = nullptr;
  return aliases;
}

}  // namespace aoti
