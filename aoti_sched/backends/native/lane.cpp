#include "lane.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
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

// A hop to a sleeping thread costs 60 to 70 µs, so a lane that has just worked spins about as long
// before it sleeps: at worst it wastes the cost of the sleep.
constexpr auto kSpin = std::chrono::microseconds(60);

// A launcher sleeps between two polls for a part of the time since the last end or launch, so it
// notices an end late by at most that part.
constexpr int kPollsPerWait = 8;
constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::milliseconds(1);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Polls `done` until it is true, for `limit` at most.
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

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

// --- WakeupFd
// -------------------------------------------------------------------------------------------------

WakeupFd::WakeupFd() {
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

WakeupFd::~WakeupFd() { close(); }

void WakeupFd::close() {
  if (read_end_ < 0) return;
  if (write_end_ != read_end_) ::close(write_end_);
  ::close(read_end_);
  read_end_ = write_end_ = -1;
}

void WakeupFd::set() {
  if (write_end_ < 0) return;
  const std::uint64_t one = 1;
  while (::write(write_end_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void WakeupFd::clear() {
  if (read_end_ < 0) return;
  std::uint64_t written[64];
  while (::read(read_end_, written, sizeof written) < 0 && errno == EINTR) {
  }
}

// --- Lanes
// ------------------------------------------------------------------------------------------------

// Completions are made at the submit, as lists of one, so no thread needs memory to pass one on.
struct Lanes::Lane {
  struct Queued {
    Work work;
    std::list<Completion> completion;
  };
  // Guarded by the thread's mutex:
  std::array<Queued, kDepth> works;  // a ring
  std::size_t first = 0;
  std::size_t queued = 0;   // in the ring
  std::size_t running = 0;  // 0 or 1
  // The thread's own:
  std::list<Completion> completion;  // of the running work
  std::optional<Run> run;            // on the device, while the thread serves its other lanes
};

// Serves one lane or several.
struct Lanes::Thread {
  std::string name;
  int core = -1;
  std::vector<Lane*> lanes;
  std::vector<std::pair<Lane*, Run*>> detached;  // on the device; has room for all lanes
  std::thread thread;
  std::mutex mutex;
  std::condition_variable wake;
  bool asleep = false;                  // guarded by mutex
  bool closing = false;                 // guarded by mutex
  std::atomic<std::size_t> signals{0};  // counts submits, for the spinning thread

  // Returns a lane whose work can begin now, or null. The mutex is held.
  Lane* next() {
    for (Lane* lane : lanes) {
      if (lane->queued > 0 && lane->running == 0) return lane;
    }
    return nullptr;
  }
};

Lanes::Lanes(Runtime runtime, std::vector<std::string> names, std::vector<int> affinities,
             int cores, std::size_t threads, std::size_t open)
    : runtime_(runtime), cores_(cores) {
  const std::size_t count = threads == 0 ? names.size() : std::min(threads, names.size());
  for (std::size_t index = 0; index < names.size(); ++index) {
    lanes_.push_back(std::make_unique<Lane>());
    if (index < count) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->name = std::move(names[index]);
      threads_.back()->core = index < affinities.size() ? affinities[index] : -1;
    }
    threads_[index % count]->lanes.push_back(lanes_.back().get());
  }
  for (auto& thread : threads_) thread->detached.reserve(thread->lanes.size());
  try {
    grow(open == 0 ? lanes_.size() : open);
  } catch (...) {
    close();
    throw;
  }
}

void Lanes::grow(std::size_t count) {
  const std::lock_guard closing(close_mutex_);
  if (closed_) return;
  count = std::min(count, lanes_.size());
  // Fewer threads than lanes serve all of them from the beginning.
  const std::size_t threads = threads_.size() < lanes_.size() ? threads_.size() : count;
  for (; started_ < threads; ++started_) {
    Thread& thread = *threads_[started_];
    thread.thread = std::thread([this, &thread] { serve(thread); });
  }
  if (count > open_.load(std::memory_order_relaxed)) open_.store(count, std::memory_order_release);
}

Lanes::~Lanes() { close(); }

bool Lanes::submit(std::size_t index, Work& work) {
  Lane& lane = *lanes_[index];
  Thread& thread = *threads_[index % threads_.size()];
  bool asleep = false;
  std::list<Completion> completion(1);
  {
    std::lock_guard lock(thread.mutex);
    if (thread.closing || lane.queued + lane.running == kDepth) return false;
    Lane::Queued& place = lane.works[(lane.first + lane.queued) % kDepth];
    place.work = std::move(work);
    place.completion.swap(completion);
    ++lane.queued;
    asleep = thread.asleep;
  }
  thread.signals.fetch_add(1, std::memory_order_release);
  if (asleep) thread.wake.notify_one();
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
  silent_ = !woken_ && !done_.empty();
  return !done_.empty();
}

std::list<Completion> Lanes::drain(std::size_t limit) {
  bool silent = false;
  {
    std::lock_guard lock(done_mutex_);
    silent = std::exchange(silent_, false);
  }
  if (!silent) wakeup_.clear();
  std::list<Completion> taken;
  bool more = false;
  {
    std::lock_guard lock(done_mutex_);
    if (done_.size() <= limit) {
      taken.swap(done_);
    } else {
      const auto end = std::next(done_.begin(), static_cast<std::ptrdiff_t>(limit));
      taken.splice(taken.end(), done_, done_.begin(), end);
    }
    more = woken_ = !done_.empty();
  }
  if (more) wakeup_.set();
  return taken;
}

void Lanes::put_back(std::list<Completion>&& completions) noexcept {
  {
    std::lock_guard lock(done_mutex_);
    done_.splice(done_.begin(), completions);
    woken_ = true;
  }
  wakeup_.set();
}

void Lanes::close() {
  std::lock_guard closing(close_mutex_);
  if (closed_) return;
  closed_ = true;
  for (auto& thread : threads_) {
    {
      std::lock_guard lock(thread->mutex);
      thread->closing = true;
    }
    thread->signals.fetch_add(1, std::memory_order_release);
    thread->wake.notify_one();
  }
  for (auto& thread : threads_) {
    if (thread->thread.joinable()) thread->thread.join();
  }
}

void Lanes::hang_up() {
  close();
  wakeup_.close();  // no thread is left that sets it
}

void Lanes::finish(Thread& thread, Lane& lane, Run& run) {
  std::list<Completion> completion;
  completion.swap(lane.completion);
  completion.front() = run.finish();
  {
    std::lock_guard lock(thread.mutex);
    lane.running = 0;  // before the completion is seen: the thread that sees it may submit again
  }
  bool wake = false;
  {
    std::lock_guard lock(done_mutex_);
    done_.splice(done_.end(), completion);
    wake = !woken_ && !polled_;
    woken_ = woken_ || wake;
  }
  finished_.fetch_add(1, std::memory_order_release);
  if (wake) wakeup_.set();  // once per burst: until the loop has drained, it is awake
}

Lanes::Lane* Lanes::wait_for_work(Thread& thread) {
  // A thread that has just worked spins if a core is left for it beside the loop's.
  const std::size_t seen = thread.signals.load(std::memory_order_acquire);
  {
    std::lock_guard lock(thread.mutex);
    if (Lane* const lane = thread.next(); lane != nullptr || thread.closing) return lane;
  }
  if (awake_.load(std::memory_order_relaxed) < cores_) {
    spin(kSpin, [&] { return thread.signals.load(std::memory_order_acquire) != seen; });
  }
  std::unique_lock lock(thread.mutex);
  Lane* lane = thread.next();
  if (lane == nullptr && !thread.closing) {
    awake_.fetch_sub(1, std::memory_order_relaxed);
    thread.asleep = true;
    thread.wake.wait(lock, [&] { return (lane = thread.next()) != nullptr || thread.closing; });
    thread.asleep = false;
    awake_.fetch_add(1, std::memory_order_relaxed);
  }
  return lane;
}

void Lanes::serve(Thread& thread) {
#ifdef __linux__
  if (thread.core >= 0) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(thread.core, &cores);
    pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);
  }
  // A thread that can be found by its name is bound.
  pthread_setname_np(pthread_self(), thread.name.substr(0, 15).c_str());
#elif defined(__APPLE__)
  pthread_setname_np(thread.name.c_str());
#endif
  if (runtime_.get_threads != nullptr) runtime_.get_threads();
  keep_contexts();
  int threads = 0;
  auto& detached = thread.detached;
  awake_.fetch_add(1, std::memory_order_relaxed);
  auto last_progress = Clock::now();
  for (;;) {
    Lane* lane = nullptr;
    if (detached.empty()) {
      lane = wait_for_work(thread);
      if (lane == nullptr) break;
    } else {
      std::lock_guard lock(thread.mutex);
      lane = thread.next();
    }
    if (lane != nullptr) {
      Work work;
      {
        std::lock_guard lock(thread.mutex);
        Lane::Queued& place = lane->works[lane->first];
        work = std::move(place.work);
        lane->completion.swap(place.completion);
        lane->first = (lane->first + 1) % kDepth;
        --lane->queued;
        lane->running = 1;
      }
      if (work.threads != threads) {
        threads = work.threads;
        if (runtime_.set_omp_threads != nullptr) runtime_.set_omp_threads(threads);
        if (runtime_.set_mkl_threads != nullptr) runtime_.set_mkl_threads(threads);
      }
      if (thread.lanes.size() == 1) {
        Run run(runtime_, std::move(work));
        run.launch();
        finish(thread, *lane, run);
        continue;
      }
      Run& run = lane->run.emplace(runtime_, std::move(work));
      run.launch();
      if (run.can_detach()) {
        run.detach();
        detached.emplace_back(lane, &run);
      } else {
        finish(thread, *lane, run);
        lane->run.reset();
      }
    }
    bool progress = lane != nullptr;
    for (auto one = detached.begin(); one != detached.end();) {
      const auto [ready, run] = *one;
      if (run->ready()) {
        finish(thread, *ready, *run);
        ready->run.reset();
        one = detached.erase(one);
        progress = true;
      } else {
        ++one;
      }
    }
    if (progress) {
      last_progress = Clock::now();
    } else {
      back_off(thread, Clock::now() - last_progress);
    }
  }
  awake_.fetch_sub(1, std::memory_order_relaxed);
}

void Lanes::back_off(Thread& thread, std::chrono::nanoseconds idle) {
  if (idle < kSpin) {
    std::this_thread::yield();
    return;
  }
  std::unique_lock lock(thread.mutex);
  thread.asleep = true;  // a submit wakes the thread
  thread.wake.wait_for(lock, std::min(idle / kPollsPerWait, kLongestSleep),
                       [&] { return thread.next() != nullptr; });
  thread.asleep = false;
}

}  // namespace aoti
