// What Python holds of models, plans, devices, streams and graphs: shared pointers, so that works
// keep them alive.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "run.hpp"

namespace aoti {

// Reads an address that Python gives as an integer.
template <typename Function>
Function at(std::uintptr_t address) {
  return reinterpret_cast<Function>(address);
}

struct PyModel {
  std::shared_ptr<const Model> model;
  std::unordered_map<std::size_t, std::shared_ptr<Staging>> stagings;  // by slot

  [[nodiscard]] const std::shared_ptr<Staging>& staging(std::size_t slot) {
    std::shared_ptr<Staging>& staging = stagings[slot];
    if (staging == nullptr) staging = std::make_shared<Staging>();
    return staging;
  }
};

struct PyPlan {
  std::shared_ptr<const Plan> plan;
};

struct PyDevice {
  std::shared_ptr<const Device> device;
};

struct PyStream {
  std::shared_ptr<Stream> stream;
};

struct PyGraph {
  std::shared_ptr<const Graph> graph;
};

struct PyArrival {
  std::shared_ptr<const Arrival> arrival;
};

using Consumers = std::vector<std::optional<std::int64_t>>;  // torch's ids of streams

// Of an input: dimension of rows, order in memory, ragged dimensions, padding element by dtype.
using PyInput = std::tuple<std::size_t, std::vector<std::size_t>, std::vector<std::size_t>,
                           std::map<int, nanobind::bytes>>;
// Of an output: dimension of rows, and (dimension, input, dimension of that input) for each that is
// cut back.
using PyOutput =
    std::tuple<std::size_t, std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>>;

[[nodiscard]] std::shared_ptr<const Plan> make_plan(const Shim& shim,
                                                    const std::vector<PyInput>& inputs,
                                                    const std::vector<PyOutput>& outputs,
                                                    bool detach_rows);

[[nodiscard]] std::shared_ptr<const Device> make_device(
    const Shim& shim, std::int32_t type, std::int32_t index, bool one_at_a_time,
    const std::map<std::string, std::uintptr_t>& functions, std::uintptr_t context,
    std::int32_t not_ready, std::uintptr_t asked);

// Takes the handles, also when it throws.
[[nodiscard]] std::shared_ptr<const Graph> make_graph(const PyDevice& device,
                                                      std::uintptr_t executable,
                                                      const std::vector<std::uintptr_t>& inputs,
                                                      const std::vector<std::uintptr_t>& outputs);

}  // namespace aoti
