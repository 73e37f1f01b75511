// Lanes whose works run on a simulated device, under a sanitizer: each slot has a stream, and its
// works come from the host or from the device, go home or stay, have the device alone or not, fail
// before or after they have launched, find the device broken, or may not wait for it at once.
//
// The arguments are the seed and the number of rounds. Returns 0 when the device saw no rule
// broken, every result was right, and nothing was lost.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <poll.h>

#include "lane.hpp"
#include "model_library.h"
#include "scripted.hpp"
#include "simulated_cuda.h"

namespace {

using scripted::device;
using scripted::set;

constexpr int kWorks = 60;  // of each slot, in each round

void check(bool holds, const char* what) {
  if (holds) return;
  const char* fault = "";
  sim_faults(&fault);
  std::fprintf(stderr, "not so: %s (%s)\n", what, fault);
  // A usual exit looks for leaks, and then hangs where another thread is reporting an error.
  std::_Exit(1);
}

struct Slot {
  container script{};
  std::shared_ptr<aoti::Model> model = std::make_shared<aoti::Model>();
  CUstream stream = nullptr;
  CUstream caller = nullptr;  // its requests come after, and its outputs are used there
  CUevent end = nullptr;      // null where the thread keeps its core busy while it waits
  std::shared_ptr<aoti::Stream> on;
  bool home = false;
  int value = 0;  // of the last work's input
  std::int64_t rows = 0;
};

aoti::Handle input(std::mt19937& random, Slot& slot, const aoti::Device& device) {
  slot.value = static_cast<int>(random() % 200);
  slot.rows = static_cast<std::int64_t>(random() % 40);
  const aoti::Handle host = new_matrix(slot.rows, 3, 4, slot.value);
  if (random() % 2 == 0 || slot.rows == 0) return host;
  // On the device already: as if the caller had made it on a stream of its own and waited for it.
  aoti::Handle there = nullptr;
  const std::int64_t sizes[] = {slot.rows, 3};
  const std::int64_t strides[] = {3, 1};
  void* to = nullptr;
  void* from = nullptr;
  if (device.shim.empty_strided(2, sizes, strides, 4, ON_DEVICE, 0, &there) != 0) return host;
  device.shim.get_data_ptr(there, &to);
  device.shim.get_data_ptr(host, &from);
  std::copy_n(static_cast<char*>(from), slot.rows * 12, static_cast<char*>(to));
  torch_delete_tensor(host);
  return there;
}

void play(std::mt19937& random, CUcontext context) {
  const int tensors = live_tensors();
  const bool breaks = random() % 3 == 0;
  const bool one_at_a_time = random() % 4 == 0;
  const auto its_device = device(context, one_at_a_time);
  cuCtxSetCurrent(context);
  {
    std::vector<std::unique_ptr<Slot>> slots;
    for (int i = 0; i < 3; ++i) {
      auto slot = std::make_unique<Slot>();
      slot->script.again = random() % 2 == 0 ? 2 : 0;
      slot->script.made = slot->script.again ? 1 : 3;
      slot->script.error = "scripted";
      slot->script.status = random() % 6 == 0;
      slot->model->run = reinterpret_cast<aoti::RunFunction>(&device_model_run);
      slot->model->container = &slot->script;
      slot->model->num_inputs = 1;
      slot->model->num_outputs = 2;
      slot->home = random() % 2 == 0;
      check(cuStreamCreate(&slot->stream, 1) == 0, "a stream can be made");
      check(cuStreamCreate(&slot->caller, 1) == 0, "a stream can be made");
      aoti::Fence fence;
      if (random() % 2 == 0) {
        check(cuEventCreate(&slot->end, 3) == 0, "an event can be made");
        set(fence.fence, &cuEventSynchronize);
        fence.argument = fence.event = slot->end;
      } else {
        set(fence.fence, &cuStreamSynchronize);
        fence.argument = slot->stream;
      }
      slot->on =
          std::make_shared<aoti::Stream>(its_device, slot->stream, fence, std::vector<bool>{true},
                                         slot->home, random() % 400, random() % 400);
      slots.push_back(std::move(slot));
    }
    aoti::Runtime runtime;
    runtime.delete_tensor = &torch_delete_tensor;
    runtime.root_cause = &torch_root_cause;
    runtime.new_handle = &torch_another_handle;
    aoti::Lanes lanes(runtime, std::vector<std::string>(2, "aoti:stress"), {}, 1, random() % 2, 1);
    std::thread growing([&lanes] { lanes.grow(2); });
    std::vector<int> left(slots.size(), kWorks);
    int under_way = 0;
    const auto submit = [&](std::size_t index) {
      Slot& slot = *slots[index];
      aoti::Work work;
      work.token = index;
      work.model = slot.model;
      work.inputs = aoti::OwnedHandles(&torch_delete_tensor);
      work.inputs.push_back(
          aoti::OwnedHandle(&torch_delete_tensor, input(random, slot, *its_device)));
      work.on = slot.on;
      try {
        if (random() % 2 == 0)
          work.after = std::make_shared<aoti::Arrival>(its_device, slot.caller);
      } catch (const std::runtime_error&) {
        check(breaks, "a request can come while the device works");
      }
      if (!slot.home) {
        const auto consumer = reinterpret_cast<std::intptr_t>(slot.caller);
        work.consumers.assign(1, random() % 4 == 0 ? std::nullopt : std::optional(consumer));
      }
      --left[index];
      ++under_way;
      for (std::size_t lane = random() % lanes.count(); !lanes.submit(lane, work);
           lane = (lane + 1) % lanes.count())
        std::this_thread::yield();
    };
    sim_take(random() % 2 == 0 ? 0 : 20);
    for (std::size_t index = 0; index < slots.size(); ++index) submit(index);
    while (under_way > 0) {
      pollfd descriptor{lanes.descriptor(), POLLIN, 0};
      check(poll(&descriptor, 1, 60000) == 1, "an accepted work comes back");
      for (aoti::Completion& completion : lanes.drain(2)) {
        --under_way;
        Slot& slot = *slots[completion.token];
        check(completion.status != 0 || slot.script.status == 0, "a scripted failure is one");
        check(breaks || completion.status == 0 || slot.script.status != 0, "what works does");
        for (aoti::Handle handle : completion.outputs) {
          if (handle == nullptr) continue;
          std::int32_t type = -1;
          torch_get_device_type(handle, &type);
          check(type == (slot.home ? ON_HOST : ON_DEVICE), "outputs are where they are wanted");
          check(is_matrix_of(handle, slot.rows, 3, slot.value + 1) == 1,
                "a completed run is complete on the device");
        }
        if (random() % 8 == 0) sim_refuse_waits(random() % 4, 900);
        if (breaks && left[completion.token] == kWorks / 2)
          sim_break(CUDA_ERROR_ILLEGAL_ADDRESS, 0);
        if (left[completion.token] > 0) submit(completion.token);
      }
    }
    growing.join();
    lanes.close();
    for (auto& slot : slots) {
      slot->on.reset();
      if (slot->end != nullptr) cuEventDestroy_v2(slot->end);
      cuStreamDestroy_v2(slot->stream);
      cuStreamDestroy_v2(slot->caller);
    }
  }
  check(sim_faults(nullptr) == 0, "no rule is broken");
  check(!one_at_a_time || sim_most_threads() <= 1, "one work at a time has the device");
  check(live_tensors() == tensors && sim_pinned() == 0 && sim_allocated() == 0, "nothing is lost");
  sim_repair();
}

}  // namespace

int main(int argc, char** argv) {
  check(argc == 3, "arguments: seed, rounds");
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[1])));
  const int rounds = std::atoi(argv[2]);
  CUcontext context = nullptr;
  cuInit(0);
  cuDevicePrimaryCtxRetain(&context, 0);
  for (int round = 0; round < rounds; ++round) play(random, context);
  std::printf("%d rounds\n", rounds);
}
