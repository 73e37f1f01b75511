#include "run.hpp"

#include <chrono>
#include <exception>
#include <new>
#include <stdexcept>
#include <utility>

namespace aoti {

namespace {

std::int64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// Records why a run failed. Both texts belong to the calling thread, so they are read on it, and at
// once.
void explain(const Runtime& runtime, const Model& model, Completion& completion) {
  const char* text = nullptr;
  if (model.last_error != nullptr && model.last_error(&text) == 0 && text != nullptr) {
    completion.error = text;
  }
  text = runtime.root_cause != nullptr ? runtime.root_cause() : nullptr;
  if (text != nullptr) completion.cause = text;
}

// Sets a text, or a shorter one that needs no memory.
void say(std::string& error, const char* text) noexcept {
  try {
    error = text;
  } catch (const std::bad_alloc&) {
    error = "out of memory";
  }
}

// Calls into the model or the device; an exception becomes a status and a text.
template <typename Call>
std::int32_t catch_all(std::string& error, Call call) noexcept {
  try {
    return call();
  } catch (const std::exception& thrown) {
    say(error, thrown.what());
  } catch (...) {
    say(error, "the model threw something that is no std::exception");
  }
  return -1;
}

// Does a step before or after the model's run, unless an earlier step failed. Torch's words are
// kept when torch refuses.
template <typename Step>
void attempt(const Runtime& runtime, Completion& completion, Step step) {
  if (completion.status != 0) return;
  completion.status = catch_all(completion.error, [&] {
    try {
      step();
    } catch (const TorchRefused&) {
      const char* const text = runtime.root_cause != nullptr ? runtime.root_cause() : nullptr;
      if (text != nullptr) completion.cause = text;
      throw;
    }
    return 0;
  });
}

// Puts another handle of the same tensor in the place of each alias. Throws TorchRefused.
void restore_aliases(const Runtime& runtime, const std::vector<Alias>& aliases,
                     OwnedHandles& outputs) {
  for (const Alias& alias : aliases) {
    if (runtime.new_handle == nullptr) throw TorchRefused("new_tensor_handle");
    check_torch(runtime.new_handle(outputs[alias.of], outputs.receive(alias.output)),
                "new_tensor_handle");
  }
}

// Sets the calling thread's intra-op threads, and restores the thread's own counts at the end.
class IntraOpThreads {
 public:
  IntraOpThreads(const Runtime& runtime, int count) : runtime_(runtime), count_(count) {
    if (runtime.get_threads == nullptr) return;  // a count that can't be restored is not changed
    omp_before_ = runtime.get_threads();
    if (runtime.set_omp_threads != nullptr && omp_before_ != count) runtime.set_omp_threads(count);
    if (runtime.set_mkl_threads != nullptr) mkl_before_ = runtime.set_mkl_threads(count);
  }
  ~IntraOpThreads() {
    if (runtime_.get_threads == nullptr) return;
    if (runtime_.set_omp_threads != nullptr && omp_before_ != count_) {
      runtime_.set_omp_threads(omp_before_);
    }
    if (runtime_.set_mkl_threads != nullptr && mkl_before_ != count_) {
      runtime_.set_mkl_threads(mkl_before_);
    }
  }
  IntraOpThreads(const IntraOpThreads&) = delete;
  IntraOpThreads& operator=(const IntraOpThreads&) = delete;

 private:
  const Runtime& runtime_;
  const int count_;
  int omp_before_ = 0;
  int mkl_before_ = 0;  // 0 is MKL's word for the process's count
};

}  // namespace

void Run::launch() noexcept {
  completion_.token = work_.token;
  completion_.started = now();
  attempt(runtime_, completion_, [&] {
    completion_.outputs = OwnedHandles(runtime_.delete_tensor, work_.model->num_outputs);
    if (work_.batch == nullptr) return;
    completion_.members = work_.batch->rows.size();
    work_.inputs = gather(*work_.batch);
  });
  if (work_.on != nullptr) attempt(runtime_, completion_, [&] { launch_on_stream(); });
  if (work_.graph != nullptr) {
    attempt(runtime_, completion_, [&] { aliases_ = work_.graph->aliases; });
    return;
  }
  run_model();
  if (stream_run_) {
    attempt(runtime_, completion_, [&] { stream_run_->start_copies(completion_.outputs); });
  }
}

void Run::launch_on_stream() {
  stream_run_.emplace(*work_.on);
  if (work_.after != nullptr) stream_run_->follow(*work_.after);
  if (work_.graph == nullptr) {
    stream_run_->to_device(work_.inputs);
  } else {
    stream_run_->launch(*work_.graph, work_.inputs, completion_.outputs);
  }
}

void Run::run_model() noexcept {
  if (completion_.status != 0) return;
  const Model& model = *work_.model;
  OwnedHandles& outputs = completion_.outputs;
  completion_.status = catch_all(completion_.error, [&] {
    void* const stream = work_.on != nullptr ? work_.on->handle() : nullptr;
    const std::int32_t status =
        model.run(model.container, work_.inputs.data(), work_.inputs.size(), outputs.data(),
                  outputs.size(), stream, model.proxy_executor);
    if (status != 0) explain(runtime_, model, completion_);
    return status;
  });
  // After a failure too: a handle that the model made before it is freed once.
  std::string error;
  const std::int32_t status = catch_all(error, [&] {
    aliases_ = take_aliases(outputs);
    return 0;
  });
  if (status == 0 || completion_.status != 0) return;
  completion_.status = status;
  completion_.error = std::move(error);
}

// On this thread, since torch's allocator is locked meanwhile, and for long while memory is made.
void Run::record_uses() const {
  const OwnedHandles& tensors = work_.batch == nullptr ? completion_.outputs : completion_.parts;
  const std::size_t each = tensors.size() / work_.consumers.size();
  const Device& device = work_.on->device();
  for (std::size_t index = 0; index < tensors.size(); ++index) {
    const std::optional<std::int64_t> stream = work_.consumers[index / each];
    if (tensors[index] == nullptr || !stream) continue;
    std::int32_t type = 0;
    check_torch(device.get_device_type(tensors[index], &type), "get_device_type");
    if (type != device.type) continue;
    const TorchStream consumer{static_cast<std::int8_t>(device.type),
                               static_cast<std::int8_t>(device.index), *stream};
    device.record_use(tensors[index], consumer);
  }
}

bool Run::ready() noexcept {
  try {
    return !stream_run_ || stream_run_->ready();
  } catch (const std::exception&) {
    return true;  // the fence reports the error
  }
}

Completion Run::finish() noexcept {
  if (stream_run_) {  // after a failure too: the device may still use the memory that is freed next
    std::string error;
    const std::int32_t fenced = catch_all(error, [&] {
      stream_run_->fence();
      return 0;
    });
    if (fenced != 0 && completion_.status == 0) {
      completion_.status = fenced;
      completion_.error = std::move(error);
    }
    attempt(runtime_, completion_, [&] { stream_run_->finish_copies(completion_.outputs); });
  }
  if (!aliases_.empty()) {
    attempt(runtime_, completion_,
            [&] { restore_aliases(runtime_, aliases_, completion_.outputs); });
  }
  if (stream_run_ && completion_.status != 0) stream_run_->forget_error();
  stream_run_.reset();
  if (work_.batch != nullptr) {
    attempt(runtime_, completion_,
            [&] { completion_.parts = split(*work_.batch, completion_.outputs); });
    if (work_.batch->plan->detach_rows) completion_.outputs.reset();
  }
  if (!work_.consumers.empty()) attempt(runtime_, completion_, [&] { record_uses(); });
  completion_.finished = now();
  if (completion_.status != 0) {
    completion_.outputs.reset();
    completion_.parts.reset();
  }
  // Freed before the completion is seen: the thread that sees it may close the device or count
  // memory.
  completion_.inputs = std::move(work_.kept);
  work_ = Work();
  return std::move(completion_);
}

Completion run_here(const Runtime& runtime, Work&& work) {
  const IntraOpThreads threads(runtime, work.threads);
  Run run(runtime, std::move(work));
  run.launch();
  return run.finish();
}

}  // namespace aoti
