// Lanes for which one allocation fails, or one thread can't be started, under a sanitizer: the
// first, the second, and so on, until everything went well.
//
// Each round opens lanes, hands them works of every kind (alone, in batches, on a simulated device;
// some fail of themselves), runs some on its own thread, and closes. Returns 0 when each accepted
// work came back once, at most one failed for want of memory, and nothing was lost. The argument
// names the fault: "memory" or "threads".
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>

#include "lane.hpp"
#include "model_library.h"
#include "scripted.hpp"
#include "simulated_cuda.h"

namespace {

using scripted::device;
using scripted::runtime;
using scripted::set;
using scripted::shim;

std::atomic<long> allocations{-1};  // until one fails; negative: none does
std::atomic<long> starts{-1};       // of threads, likewise
thread_local bool spared = false;   // this thread's allocations never fail

// The library's code on this thread meets the fault, too.
struct Exposed {
  Exposed() { spared = false; }
  ~Exposed() { spared = true; }
};

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  // A usual exit looks for leaks, and then hangs where another thread is reporting an error.
  std::_Exit(1);
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  if (!spared && allocations.load() >= 0 && allocations.fetch_sub(1) == 0) throw std::bad_alloc();
  if (void* const memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*),
                              void* given) noexcept {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (starts.load() >= 0 && starts.fetch_sub(1) == 0) return EAGAIN;
  return create(thread, how, run, given);
}

namespace {

enum Kind { kSucceeds, kFails, kThrows, kRows, kBatch, kRaggedBatch, kOnDevice, kHome, kKinds };
constexpr const char* kLong =
    "an error whose text is so long that no string holds it without memory of its own";
constexpr std::int64_t kRowsOfOne = 2;
constexpr std::int64_t kColumns = 3;

// A model of each kind, and what its works need beside it.
struct Models {
  explicit Models(CUcontext context) {
    const auto its_device = device(context);
    for (int kind = 0; kind < kKinds; ++kind) {
      container& script = scripts[kind];
      script.stolen = 1;
      script.made = 1;
      script.again = 2;  // the second output is the first one again
      script.error = kLong;
      script.cause = kLong;
      script.status = kind == kFails;
      script.throws = kind == kThrows ? THROWS_STANDARD : THROWS_NOTHING;
      auto model = std::make_shared<aoti::Model>();
      if (kind < kRows)
        set(model->run, &model_run);
      else if (kind < kOnDevice)
        set(model->run, &row_model_run);
      else
        set(model->run, &device_model_run);
      model->container = &script;
      model->num_inputs = 1;
      model->num_outputs = 2;
      model->last_error = &model_last_error;
      models.push_back(std::move(model));
      if (kind != kOnDevice && kind != kHome) continue;
      CUstream& stream = streams[kind - kOnDevice];
      check(cuStreamCreate(&stream, 1) == 0, "a stream can be made");
      aoti::Fence fence;
      set(fence.fence, &cuStreamSynchronize);
      fence.argument = stream;
      on.push_back(std::make_shared<aoti::Stream>(its_device, stream, fence,
                                                  std::vector<bool>{true}, kind == kHome));
    }
    for (const bool ragged : {false, true}) {
      aoti::InputPlan input{0, {0, 1}, {}, {}};
      aoti::OutputPlan output{0, {}};
      if (ragged) {
        input.ragged = {1};
        input.pads = {{4, std::string("\x01\x02\x03\x04")}};
        output.ragged = {{1, 0, 1}};
      }
      plans.push_back(
          std::make_shared<const aoti::Plan>(shim(), std::vector<aoti::InputPlan>{input},
                                             std::vector<aoti::OutputPlan>(2, output), ragged));
      stagings.push_back(std::make_shared<aoti::Staging>());
    }
  }
  ~Models() {
    on.clear();
    for (CUstream stream : streams) cuStreamDestroy_v2(stream);
  }
  Models(const Models&) = delete;
  Models& operator=(const Models&) = delete;

  container scripts[kKinds]{};
  std::vector<std::shared_ptr<const aoti::Model>> models;
  CUstream streams[2]{};
  std::vector<std::shared_ptr<aoti::Stream>> on;
  std::vector<std::shared_ptr<const aoti::Plan>> plans;
  std::vector<std::shared_ptr<aoti::Staging>> stagings;
};

struct Round {
  explicit Round(CUcontext context) : models(context) {}

  Models models;
  std::vector<aoti::Handle> members;  // of the batches
  std::vector<int> ends = std::vector<int>(kKinds, 0);
  int starved = 0;  // works that failed for want of memory

  aoti::Work work(int kind) {
    aoti::Work made;
    made.token = static_cast<std::uint64_t>(kind);
    made.model = models.models[static_cast<std::size_t>(kind)];
    made.inputs = aoti::OwnedHandles(&torch_delete_tensor);
    if (kind == kBatch || kind == kRaggedBatch) {
      const auto which = static_cast<std::size_t>(kind - kBatch);
      std::vector<aoti::Handle> tensors;
      for (int member = 0; member < 3; ++member)
        tensors.push_back(new_matrix(kRowsOfOne, kColumns + (which ? member : 0), 4, 5));
      members.insert(members.end(), tensors.begin(), tensors.end());
      made.batch =
          std::make_unique<aoti::Batch>(models.plans[which], models.stagings[which], tensors,
                                        std::vector<std::int64_t>(3, kRowsOfOne), 3 * kRowsOfOne);
      return made;
    }
    made.inputs.push_back(
        aoti::OwnedHandle(&torch_delete_tensor,
                          kind < kRows ? new_tensor() : new_matrix(kRowsOfOne, kColumns, 4, 5)));
    if (kind >= kOnDevice) made.on = models.on[static_cast<std::size_t>(kind - kOnDevice)];
    return made;
  }

  void ended(const aoti::Completion& completion) {
    const auto kind = static_cast<int>(completion.token);
    ++ends[completion.token];
    if (kind == kFails || kind == kThrows) {
      check(completion.status != 0, "what fails by itself fails");
      check(!completion.error.empty(), "a failure has a text");
      return;
    }
    if (completion.status != 0) {
      check(!completion.error.empty(), "a failure for want of memory has a text");
      ++starved;
      for (aoti::Handle handle : completion.outputs)
        check(handle == nullptr, "a failed run gives no outputs");
      return;
    }
    if (kind == kBatch || kind == kRaggedBatch) {
      check(completion.parts.size() == 6, "each member has its outputs");
      for (std::size_t part = 0; part < 6; ++part) {
        const std::int64_t columns =
            kColumns + (kind == kBatch ? 0 : static_cast<std::int64_t>(part / 2));
        check(is_matrix_of(completion.parts[part], kRowsOfOne, columns, 6),
              "a member's rows are its own");
      }
    } else if (kind >= kRows) {
      check(completion.outputs.size() == 2, "all outputs are there");
      for (aoti::Handle handle : completion.outputs)
        check(is_matrix_of(handle, kRowsOfOne, kColumns, 6), "a result is right");
    }
  }

  void drain(aoti::Lanes& lanes) {
    pollfd descriptor{lanes.descriptor(), POLLIN, 0};
    check(poll(&descriptor, 1, 20000) == 1, "an accepted work comes back");
    const Exposed exposed;
    for (const aoti::Completion& completion : lanes.drain(2)) {
      spared = true;
      ended(completion);
      spared = false;
    }
  }

  void play(std::size_t threads) {
    std::unique_ptr<aoti::Lanes> lanes;
    std::vector<std::string> names(2, "aoti:starved lane of a long name");
    {
      const Exposed exposed;
      lanes = std::make_unique<aoti::Lanes>(runtime(), std::move(names), std::vector<int>(), 2,
                                            threads);
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      aoti::Work one = work(kind);
      for (bool accepted = false; !accepted;) {
        try {
          const Exposed exposed;
          accepted = lanes->submit(static_cast<std::size_t>(kind % 2), one);
        } catch (const std::bad_alloc&) {
          check(one.model != nullptr && (one.batch != nullptr || one.inputs.size() == 1),
                "a work that is not taken is whole");
          continue;
        }
        if (!accepted) drain(*lanes);  // the lane is full
      }
    }
    const auto all_back = [&] {
      for (int count : ends) {
        if (count < 1) return false;
      }
      return true;
    };
    while (!all_back()) drain(*lanes);
    for (int count : ends) check(count == 1, "a work comes back once");
    for (int kind = 0; kind < kKinds; ++kind) {
      aoti::Work one = work(kind);
      aoti::Completion completion;
      {
        const Exposed exposed;
        completion = aoti::run_here(lanes->runtime(), std::move(one));
      }
      ended(completion);
    }
    check(starved <= 1, "one failed allocation fails one work at most");
    lanes->close();
  }
};

// Returns whether the fault came.
bool play(std::atomic<long>& fault, long nth, std::size_t threads, CUcontext context) {
  const int tensors = live_tensors();
  const int storages = live_storages();
  {
    Round round(context);
    fault = nth;
    try {
      round.play(threads);
    } catch (const std::bad_alloc&) {
      check(&fault == &allocations, "memory is missed where it is missing");
    } catch (const std::system_error& error) {
      check(&fault == &starts && error.code().value() == EAGAIN,
            "a thread is missed where it is missing");
    }
    for (aoti::Handle member : round.members) torch_delete_tensor(member);
  }
  const bool came = fault.exchange(-1) < 0;
  check(live_tensors() == tensors && live_storages() == storages, "no tensor is lost");
  check(sim_faults(nullptr) == 0 && sim_pinned() == 0 && sim_allocated() == 0,
        "nothing is lost on the device");
  return came;
}

}  // namespace

int main(int argc, char** argv) {
  check(argc == 2, "argument: memory or threads");
  std::atomic<long>& fault = std::string(argv[1]) == "memory" ? allocations : starts;
  spared = true;
  CUcontext context = nullptr;
  cuInit(0);
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxSetCurrent(context);
  long faults = 0;
  for (const std::size_t threads : {0U, 1U}) {
    for (long nth = 0; play(fault, nth, threads, context); ++nth) ++faults;
  }
  std::printf("%ld faults\n", faults);
}
