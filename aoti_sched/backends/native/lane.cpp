#include "lane.hpp"

#include <cerrno>
#include <chrono>
#include <exception>
#include <iterator>
#include <optional>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/eventfd.h>
#endif

namespace aoti {

namespace {

using Clock = std::chrono::steady_clock;

// A hop to a sleeping thread costs 60 to 70 µs, so a lane that has just worked looks for more about as long
// before it sleeps: at worst it wastes what the sleep would have cost.
constexpr auto kSpin = std::chrono::microseconds(60);

std::int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks again and again whether `done`, for so long at most.
template <typename Done>
void spin(std::chrono::nanoseconds limit, Done done) {
  const auto until = Clock::now() + limit;
  while (Clock::now() < until) {
    for (int i = 0; i < 32; ++i) {
      if (done()) return;
      relax();
    }
  }
}

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

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

void free_handles(const Runtime& runtime, std::vector<Handle>& handles) {
  for (Handle& handle : handles) {
    if (handle != nullptr) runtime.delete_tensor(std::exchange(handle, nullptr));
  }
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

// Runs a work on the calling thread with the intra-op threads it has.
Completion run_work(const Runtime& runtime, Work& work) {
  const Model& model = *work.model;
  Completion completion;
  completion.token = work.token;
  completion.outputs.assign(model.num_outputs, nullptr);
  completion.started = now();
  Batch* const batch = work.batch.get();
  if (batch != nullptr) {
    completion.members = batch->rows.size();
    completion.status = guard_torch(runtime, completion, [&] { gather(*batch, work.inputs); });
  }
  std::optional<Stream::Run> on;  // from here until the device is done
  if (work.on != nullptr && completion.status == 0) {
    completion.status = guard_torch(runtime, completion, [&] {
      on.emplace(*work.on);
      if (work.graph == nullptr) {
        on->bring(work.inputs);
      } else {
        on->replay(*work.graph, work.inputs, completion.outputs);
      }
    });
  }
  void* const stream = work.on != nullptr ? work.on->handle() : work.stream;
  if (work.graph == nullptr && completion.status == 0) {
    completion.status = guard(completion.error, [&] {
      const std::int32_t status =
          model.run(model.container, work.inputs.data(), work.inputs.size(), completion.outputs.data(),
                    completion.outputs.size(), stream, model.proxy_executor);
      if (status != 0) explain(runtime, model, completion);
      return status;
    });
  }
  if (on && work.graph == nullptr && completion.status == 0) {
    completion.status = guard_torch(runtime, completion, [&] { on->send_home(completion.outputs); });
  }
  if (on || work.fence != nullptr) {  // after a failure too: what was launched before it may still use what we free
    std::string error;
    const std::int32_t fenced = guard(error, [&] {
      if (!on) return work.fence(work.fence_argument);
      on->fence();
      return 0;
    });
    if (fenced != 0 && completion.status == 0) {
      completion.status = fenced;
      if (error.empty()) error = "waiting for the device failed with status " + std::to_string(fenced);
      completion.error = std::move(error);
    }
  }
  if (on && completion.status == 0) {
    completion.status = guard_torch(runtime, completion, [&] { on->land(completion.outputs); });
  }
  on.reset();
  work.graph.reset();
  work.on.reset();  // before the completion is seen: who sees it may close the device
  if (batch != nullptr && completion.status == 0) {
    completion.status = guard_torch(runtime, completion, [&] { split(*batch, completion.outputs, completion.parts); });
    if (batch->plan->detach_rows) free_handles(runtime, completion.outputs);
  }
  completion.finished = now();
  free_handles(runtime, work.inputs);  // what the model stole is null
  if (completion.status != 0) {
    free_handles(runtime, completion.outputs);
    free_handles(runtime, completion.parts);
  }
  return completion;
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

Completion run_here(const Runtime& runtime, Work& work) {
  const ThreadsHere threads(runtime, work.threads);
  return run_work(runtime, work);
}

// --- Bell -------------------------------------------------------------------------------------------------

Bell::Bell() {
#ifdef __linux__
  read_end_ = write_end_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (read_end_ < 0) fail("eventfd");
#else
  int ends[2];
  if (pipe(ends) != 0) fail("pipe");
  for (int end : ends) {
    fcntl(end, F_SETFL, fcntl(end, F_GETFL) | O_NONBLOCK);
    fcntl(end, F_SETFD, FD_CLOEXEC);
  }
  read_end_ = ends[0];
  write_end_ = ends[1];
#endif
}

Bell::~Bell() {
  if (write_end_ != read_end_) ::close(write_end_);
  ::close(read_end_);
}

void Bell::ring() {
  const std::uint64_t one = 1;
  while (::write(write_end_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void Bell::hush() {
  std::uint64_t rings[64];
  while (::read(read_end_, rings, sizeof rings) < 0 && errno == EINTR) {
  }
}

// --- Lanes ------------------------------------------------------------------------------------------------

struct Lanes::Lane {
  std::string name;
  int core = -1;
  std::thread thread;
  std::mutex mutex;
  std::condition_variable wake;
  std::array<Work, kDepth> works;     // a ring, guarded by mutex
  std::size_t first = 0;              // guarded by mutex
  std::size_t queued = 0;             // in the ring, guarded by mutex
  std::size_t running = 0;            // 0 or 1, guarded by mutex
  bool asleep = false;                // guarded by mutex
  bool closing = false;               // guarded by mutex
  std::atomic<std::size_t> signals{0};  // counts submits, for the spinning thread
};

Lanes::Lanes(Runtime runtime, std::vector<std::string> names, std::vector<int> affinities, int cores)
    : runtime_(runtime), cores_(cores) {
  for (std::size_t index = 0; index < names.size(); ++index) {
    auto lane = std::make_unique<Lane>();
    lane->name = std::move(names[index]);
    lane->core = index < affinities.size() ? affinities[index] : -1;
    lanes_.push_back(std::move(lane));
  }
  try {
    for (auto& lane : lanes_) lane->thread = std::thread([this, &lane = *lane] { serve(lane); });
  } catch (...) {
    close();
    throw;
  }
}

Lanes::~Lanes() {
  close();
  for (Completion& completion : done_) {
    free_handles(runtime_, completion.outputs);
    free_handles(runtime_, completion.parts);
  }
}

bool Lanes::submit(std::size_t index, Work& work) {
  Lane& lane = *lanes_[index];
  bool asleep = false;
  {
    std::lock_guard lock(lane.mutex);
    if (lane.closing || lane.queued + lane.running == kDepth) return false;
    lane.works[(lane.first + lane.queued) % kDepth] = std::move(work);
    ++lane.queued;
    asleep = lane.asleep;
  }
  lane.signals.fetch_add(1, std::memory_order_release);
  if (asleep) lane.wake.notify_one();
  return true;
}

bool Lanes::poll(std::chrono::nanoseconds limit) {
  const std::size_t seen = finished_.load(std::memory_order_acquire);
  {
    std::lock_guard lock(done_mutex_);
    if (!done_.empty()) return true;
    polled_ = true;
  }
  spin(limit, [&] { return finished_.load(std::memory_order_acquire) != seen; });
  std::lock_guard lock(done_mutex_);
  polled_ = false;
  silent_ = !rung_ && !done_.empty();
  return !done_.empty();
}

std::vector<Completion> Lanes::drain(std::size_t limit) {
  bool silent = false;
  {
    std::lock_guard lock(done_mutex_);
    silent = std::exchange(silent_, false);
  }
  if (!silent) bell_.hush();
  std::vector<Completion> taken;
  bool more = false;
  {
    std::lock_guard lock(done_mutex_);
    if (done_.size() <= limit) {
      taken.swap(done_);
    } else {
      const auto end = done_.begin() + static_cast<std::ptrdiff_t>(limit);
      taken.assign(std::make_move_iterator(done_.begin()), std::make_move_iterator(end));
      done_.erase(done_.begin(), end);
    }
    more = rung_ = !done_.empty();
  }
  if (more) bell_.ring();
  return taken;
}

void Lanes::close() {
  std::lock_guard closing(close_mutex_);
  if (closed_) return;
  closed_ = true;
  for (auto& lane : lanes_) {
    {
      std::lock_guard lock(lane->mutex);
      lane->closing = true;
    }
    lane->signals.fetch_add(1, std::memory_order_release);
    lane->wake.notify_one();
  }
  for (auto& lane : lanes_) {
    if (lane->thread.joinable()) lane->thread.join();
  }
}

void Lanes::finish(Completion&& completion) {
  bool ring = false;
  {
    std::lock_guard lock(done_mutex_);
    done_.push_back(std::move(completion));
    ring = !rung_ && !polled_;
    rung_ = rung_ || ring;
  }
  finished_.fetch_add(1, std::memory_order_release);
  if (ring) bell_.ring();  // once per burst: until the loop has drained, it knows
}

bool Lanes::wait_for_work(Lane& lane) {
  // Only a lane that has just worked comes here awake. It spins if a core is left for it beside the loop's.
  const std::size_t seen = lane.signals.load(std::memory_order_acquire);
  {
    std::lock_guard lock(lane.mutex);
    if (lane.queued > 0) return true;
    if (lane.closing) return false;
  }
  if (awake_.load(std::memory_order_relaxed) < cores_) {
    spin(kSpin, [&] { return lane.signals.load(std::memory_order_acquire) != seen; });
  }
  std::unique_lock lock(lane.mutex);
  if (lane.queued == 0 && !lane.closing) {
    awake_.fetch_sub(1, std::memory_order_relaxed);
    lane.asleep = true;
    lane.wake.wait(lock, [&] { return lane.queued > 0 || lane.closing; });
    lane.asleep = false;
    awake_.fetch_add(1, std::memory_order_relaxed);
  }
  return lane.queued > 0;
}

void Lanes::serve(Lane& lane) {
#ifdef __linux__
  pthread_setname_np(pthread_self(), lane.name.substr(0, 15).c_str());
  if (lane.core >= 0) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(lane.core, &cores);
    pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);
  }
#elif defined(__APPLE__)
  pthread_setname_np(lane.name.c_str());
#endif
  if (runtime_.get_threads != nullptr) runtime_.get_threads();
  int threads = 0;
  awake_.fetch_add(1, std::memory_order_relaxed);
  while (wait_for_work(lane)) {
    Work work;
    {
      std::lock_guard lock(lane.mutex);
      work = std::move(lane.works[lane.first]);
      lane.first = (lane.first + 1) % kDepth;
      --lane.queued;
      lane.running = 1;
    }
    if (work.threads != threads) {
      threads = work.threads;
      if (runtime_.set_omp_threads != nullptr) runtime_.set_omp_threads(threads);
      if (runtime_.set_mkl_threads != nullptr) runtime_.set_mkl_threads(threads);
    }
    Completion completion = run_work(runtime_, work);
    {
      std::lock_guard lock(lane.mutex);
      lane.running = 0;  // before the completion is seen: who sees it may submit again
    }
    finish(std::move(completion));
  }
  awake_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace aoti
