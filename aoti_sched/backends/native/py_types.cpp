#include "py_types.hpp"

#include <stdexcept>
#include <type_traits>
#include <utility>

namespace nb = nanobind;

namespace aoti {

std::shared_ptr<const Plan> make_plan(const Shim& shim, const std::vector<PyInput>& inputs,
                                      const std::vector<PyOutput>& outputs, bool detach_rows) {
  std::vector<InputPlan> all_in;
  for (const auto& [dim, order, ragged, pads] : inputs) {
    InputPlan input{dim, order, ragged, {}};
    for (const auto& [dtype, pad] : pads) input.pads[dtype] = std::string(pad.c_str(), pad.size());
    all_in.push_back(std::move(input));
  }
  std::vector<OutputPlan> all_out;
  for (const auto& [dim, ragged] : outputs) {
    OutputPlan output{dim, {}};
    for (const auto& [of, input, input_dim] : ragged)
      output.ragged.push_back({of, input, input_dim});
    all_out.push_back(std::move(output));
  }
  return std::make_shared<const Plan>(shim, std::move(all_in), std::move(all_out), detach_rows);
}

std::shared_ptr<const Device> make_device(const Shim& shim, std::int32_t type, std::int32_t index,
                                          bool one_at_a_time,
                                          const std::map<std::string, std::uintptr_t>& functions,
                                          std::uintptr_t context, std::int32_t not_ready,
                                          std::uintptr_t asked) {
  auto made = std::make_shared<Device>();
  Device& device = *made;
  std::size_t found = 0;
  const auto set = [&](auto& function, const char* name) {
    const auto entry = functions.find(name);
    if (entry == functions.end()) return;
    function = at<std::remove_reference_t<decltype(function)>>(entry->second);
    ++found;
  };
  device.shim = shim;
  device.type = type;
  device.index = index;
  device.one_at_a_time = one_at_a_time;
  device.driver.context = at<void*>(context);
  device.driver.not_ready = not_ready;
  device.driver.asked = at<void*>(asked);
  set(device.new_handle, "new_handle");
  set(device.get_device_type, "get_device_type");
  set(device.copy, "copy");
  set(device.guard, "guard");
  set(device.unguard, "unguard");
  set(device.driver.get_context, "get_context");
  set(device.driver.set_context, "set_context");
  set(device.driver.exchange_capture_mode, "exchange_capture_mode");
  set(device.record_use, "record_use");
  set(device.driver.query, "query");
  set(device.driver.is_capturing, "is_capturing");
  set(device.driver.make_event, "make_event");
  set(device.driver.destroy_event, "destroy_event");
  set(device.driver.wait_for_event, "wait_for_event");
  set(device.driver.record_event, "record_event");
  set(device.driver.query_event, "query_event");
  set(device.driver.copy_in, "copy_in");
  set(device.driver.copy_out, "copy_out");
  set(device.driver.allocate_host, "allocate_host");
  set(device.driver.free_host, "free_host");
  set(device.driver.launch_graph, "launch_graph");
  set(device.driver.explain, "explain");
  set(device.driver.take_last_error, "take_last_error");
  if (found != functions.size())
    throw std::invalid_argument("a device has no function of that name");
  if (device.new_handle == nullptr || device.get_device_type == nullptr || device.copy == nullptr) {
    throw std::invalid_argument("new_handle, get_device_type and copy must be given");
  }
  if ((device.guard == nullptr) != (device.unguard == nullptr)) {
    throw std::invalid_argument("guard and unguard: both or none");
  }
  const Driver& driver = device.driver;
  const bool some =
      driver.copy_in != nullptr || driver.copy_out != nullptr || driver.allocate_host != nullptr;
  const bool all = driver.get_context != nullptr && driver.set_context != nullptr &&
                   driver.copy_in != nullptr && driver.copy_out != nullptr &&
                   driver.allocate_host != nullptr && driver.free_host != nullptr;
  if (some && !all) throw std::invalid_argument("a driver's functions: all or none");
  return made;
}

std::shared_ptr<const Graph> make_graph(const PyDevice& device, std::uintptr_t executable,
                                        const std::vector<std::uintptr_t>& inputs,
                                        const std::vector<std::uintptr_t>& outputs) {
  const auto adopt = [&](const std::vector<std::uintptr_t>& addresses) {
    OwnedHandles handles(device.device->shim.delete_tensor, addresses.size());
    for (std::size_t i = 0; i < addresses.size(); ++i) handles.data()[i] = at<Handle>(addresses[i]);
    return handles;
  };
  OwnedHandles read = adopt(inputs);
  OwnedHandles written = adopt(outputs);
  if (device.device->driver.launch_graph == nullptr) {
    static_cast<void>(take_aliases(written));  // the handles are freed once each
    throw std::invalid_argument("the device launches no graphs");
  }
  return std::make_shared<const Graph>(device.device, at<void*>(executable), std::move(read),
                                       std::move(written));
}

}  // namespace aoti
