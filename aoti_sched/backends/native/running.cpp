#include "running.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace aoti {

namespace {

std::int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What is known of a failure; both texts are the calling thread's, so this is the only place to ask.
void explain(const Runtime& runtime, const Model& model, Completion& completion) {
  const char* text = nullptr;
  if (model.last_error != nullptr && model.last_error(&text) == 0 && text != nullptr) completion.error = text;
  text = runtime.root_cause != nullptr ? runtime.root_cause() : nullptr;
  if (text != nullptr) completion.cause = text;
}

// A call into the model or the device; what it throws becomes a status and a text.
template <typename Call>
std::int32_t guard(std::string& error, Call call) {
  try {
    return call();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  } catch (...) {
    error = "the model threw something that is no std::exception";
  }
  return -1;
}

// What is done with a batch's tensors before its run or after it, as `guard` does it; torch's words go with its refusals.
template <typename Call>
std::int32_t guard_torch(const Runtime& runtime, Completion& completion, Call call) {
  return guard(completion.error, [&] {
    try {
      call();
    } catch (const TorchRefused&) {
      const char* const text = runtime.root_cause != nullptr ? runtime.root_cause() : nullptr;
      if (text != nullptr) completion.cause = text;
      throw;
    }
    return 0;
  });
}

// Puts another handle of the same tensor in the place of each alias. Throws TorchRefused.
void give_aliases(const Runtime& runtime, const std::vector<Alias>& aliases, std::vector<Handle>& outputs) {
  for (const Alias& alias : aliases) {
    if (runtime.new_handle == nullptr || runtime.new_handle(outputs[alias.of], &outputs[alias.output]) != 0) {
      throw TorchRefused("new_tensor_handle");
    }
  }
}

// Gives the calling thread so many intra-op threads, and at the end those that it had.
class ThreadsHere {
 public:
  ThreadsHere(const Runtime& runtime, int count) : runtime_(runtime), count_(count) {
    if (runtime.get_threads == nullptr) return;  // what can't be put back is not changed
    omp_before_ = runtime.get_threads();
    if (runtime.set_omp_threads != nullptr && omp_before_ != count) runtime.set_omp_threads(count);
    if (runtime.set_mkl_threads != nullptr) mkl_before_ = runtime.set_mkl_threads(count);
  }
  ~ThreadsHere() {
    if (runtime_.get_threads == nullptr) return;
    if (runtime_.set_omp_threads != nullptr && omp_before_ != count_) runtime_.set_omp_threads(omp_before_);
    if (runtime_.set_mkl_threads != nullptr && mkl_before_ != count_) runtime_.set_mkl_threads(mkl_before_);
  }
  ThreadsHere(const ThreadsHere&) = delete;
  ThreadsHere& operator=(const ThreadsHere&) = delete;

 private:
  const Runtime& runtime_;
  const int count_;
  int omp_before_ = 0;
  int mkl_before_ = 0;  // 0 is MKL's word for the process's count
};

}  // namespace

std::vector<Alias> take_aliases(std::vector<Handle>& handles) {
  constexpr std::size_t kFew = 32;  // up to here it is cheaper to compare all than to sort them
  std::vector<Alias> aliases;
  if (handles.size() <= kFew) {
    for (std::size_t output = 1; output < handles.size(); ++output) {
      if (handles[output] == nullptr) continue;
      const auto end = handles.begin() + static_cast<std::ptrdiff_t>(output);
      const auto first = std::find(handles.begin(), end, *end);
      if (first != end) aliases.push_back({output, static_cast<std::size_t>(first - handles.begin())});
      if (first != end) *end = nullptr;
    }
    return aliases;
  }
  std::vector<std::size_t> order(handles.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t one, std::size_t other) {
    return std::less<Handle>()(handles[one], handles[other]);
  });
  std::size_t first = order[0];
  for (std::size_t place = 1; place < order.size(); ++place) {
    const std::size_t output = order[place];
    if (handles[output] == nullptr || handles[output] != handles[first]) {
      first = output;
    } else {
      aliases.push_back({output, first});
      handles[output] = nullptr;
    }
  }
  return aliases;
}

void free_handles(const Runtime& runtime, std::vector<Handle>& handles) {
  for (Handle& handle : handles) {
    if (handle != nullptr) runtime.delete_tensor(std::exchange(handle, nullptr));
  }
}

// --- Running ----------------------------------------------------------------------------------------------

Running::Running(const Runtime& runtime, Work&& work)
    : runtime_(runtime), work_(std::move(work)), model_(*work_.model) {
  begin();
}

void Running::begin() {
  completion_.token = work_.token;
  completion_.outputs.assign(model_.num_outputs, nullptr);
  completion_.started = now();
  if (Batch* const batch = work_.batch.get(); batch != nullptr) {
    completion_.members = batch->rows.size();
    completion_.status = guard_torch(runtime_, completion_, [&] { gather(*batch, work_.inputs); });
  }
  if (work_.on != nullptr && completion_.status == 0) {
    completion_.status = guard_torch(runtime_, completion_, [&] {
      on_.emplace(*work_.on);
      if (work_.graph == nullptr) {
        on_->bring(work_.inputs);
      } else {
        on_->launch(*work_.graph, work_.inputs, completion_.outputs);
      }
    });
  }
  if (work_.graph != nullptr) {
    aliases_ = work_.graph->aliases;
    return;
  }
  void* const stream = work_.on != nullptr ? work_.on->handle() : work_.stream;
  if (completion_.status == 0) {
    completion_.status = guard(completion_.error, [&] {
      const std::int32_t status =
          model_.run(model_.container, work_.inputs.data(), work_.inputs.size(), completion_.outputs.data(),
                     completion_.outputs.size(), stream, model_.proxy_executor);
      if (status != 0) explain(runtime_, model_, completion_);
      return status;
    });
    aliases_ = take_aliases(completion_.outputs);  // after a failure too: what was made before it is freed once
  }
  if (on_ && completion_.status == 0) {
    completion_.status = guard_torch(runtime_, completion_, [&] { on_->send_home(completion_.outputs); });
  }
}

bool Running::ready() {
  try {
    return on_->ready();
  } catch (const std::runtime_error&) {
    return true;  // the fence says what it is
  }
}

Completion Running::end() {
  if (on_ || work_.fence != nullptr) {  // after a failure too: what was launched before it may still use what we free
    std::string error;
    const std::int32_t fenced = guard(error, [&] {
      if (!on_) return work_.fence(work_.fence_argument);
      on_->fence();
      return 0;
    });
    if (fenced != 0 && completion_.status == 0) {
      completion_.status = fenced;
      if (error.empty()) error = "waiting for the device failed with status " + std::to_string(fenced);
      completion_.error = std::move(error);
    }
  }
  if (on_ && completion_.status == 0) {
    completion_.status = guard_torch(runtime_, completion_, [&] { on_->land(completion_.outputs); });
  }
  if (!aliases_.empty() && completion_.status == 0) {
    completion_.status =
        guard_torch(runtime_, completion_, [&] { give_aliases(runtime_, aliases_, completion_.outputs); });
  }
  on_.reset();
  work_.graph.reset();
  work_.on.reset();  // before the completion is seen: who sees it may close the device
  Batch* const batch = work_.batch.get();
  if (batch != nullptr && completion_.status == 0) {
    completion_.status =
        guard_torch(runtime_, completion_, [&] { split(*batch, completion_.outputs, completion_.parts); });
    if (batch->plan->detach_rows) free_handles(runtime_, completion_.outputs);
  }
  completion_.finished = now();
  free_handles(runtime_, work_.inputs);  // what the model stole is null
  if (completion_.status != 0) {
    free_handles(runtime_, completion_.outputs);
    free_handles(runtime_, completion_.parts);
  }
  return std::move(completion_);
}

Completion run_here(const Runtime& runtime, Work& work) {
  const ThreadsHere threads(runtime, work.threads);
  return Running(runtime, std::move(work)).end();
}

}  // namespace aoti
