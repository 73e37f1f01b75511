// Lanes: native threads that run compiled models, one work at a time each, and never touch Python.
//
// Nothing here knows torch or Python. Models, their errors and tensors arrive as function pointers
// and handles, so one build serves every torch, and the tests drive the lanes with a small C
// library.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "run.hpp"

namespace aoti {

// A descriptor that is readable while completions wait.
class WakeupFd {
 public:
  WakeupFd();
  ~WakeupFd();
  WakeupFd(const WakeupFd&) = delete;
  WakeupFd& operator=(const WakeupFd&) = delete;
  void set();
  void clear();
  void close();  // when no thread sets it any more; closing twice does nothing
  [[nodiscard]] int descriptor() const { return read_end_; }

 private:
  int read_end_ = -1;
  int write_end_ = -1;
};

class Lanes {
 public:
  static constexpr std::size_t kDepth = 8;  // one running, and MOST_AHEAD of placement.py

  // Starts the lanes. Throws std::system_error.
  //
  // names: One for each lane. A lane with a thread of its own gives the thread its name.
  // affinities: A core for each lane; negative or missing leaves the lane's thread to the system.
  // cores: Lanes spin for work only while fewer threads than this are awake.
  // threads: The number of threads for all lanes; 0 for one each. A thread that serves several
  // lanes launches
  //   their works on a device and polls for the ends.
  // open: The number of lanes to begin with; 0 for all. `grow` opens the others.
  Lanes(Runtime runtime, std::vector<std::string> names, std::vector<int> affinities, int cores,
        std::size_t threads = 0, std::size_t open = 0);
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  // Returns how many lanes are open.
  [[nodiscard]] std::size_t count() const { return open_.load(std::memory_order_acquire); }
  // Opens lanes until there are `count`, or as many as there are names. Any thread may call this.
  // Throws std::system_error, and then opens none. Closed lanes stay as they are.
  void grow(std::size_t count);
  [[nodiscard]] int descriptor() const { return wakeup_.descriptor(); }
  [[nodiscard]] const Runtime& runtime() const { return runtime_; }
  void wake() { wakeup_.set(); }

  // Returns false, and leaves the work untouched, when the lane is full or closed. Throws
  // std::bad_alloc, and leaves the work untouched, when there is no memory for its completion: an
  // accepted work completes without more memory.
  [[nodiscard]] bool submit(std::size_t lane, Work& work);

  // Returns at most `limit` completions, oldest first. The descriptor stays readable while there
  // are more.
  [[nodiscard]] std::list<Completion> drain(std::size_t limit);

  // Takes drained completions back, for the next `drain`.
  void put_back(std::list<Completion>&& completions) noexcept;

  // Spins until a completion waits, for `limit` at most. Returns whether one waits. Completions
  // that come meanwhile don't wake the loop: the caller drains them. One thread at a time polls.
  [[nodiscard]] bool poll(std::chrono::nanoseconds limit);

  // Waits for the submitted works, then joins the threads. Closing twice does nothing.
  void close();

  // Closes, and closes the descriptor, which is -1 from then on.
  void hang_up();

 private:
  struct Lane;
  struct Thread;
  void serve(Thread& thread);
  // Returns a lane whose work can begin; null when the lanes are closing and no work is left.
  Lane* wait_for_work(Thread& thread);
  // Sleeps between two polls of a device, longer the longer nothing has ended; a submit ends the
  // sleep.
  static void back_off(Thread& thread, std::chrono::nanoseconds idle);
  void finish(Thread& thread, Lane& lane, Run& run);

  Runtime runtime_;
  int cores_;
  std::atomic<int> awake_{0};  // threads that run or spin
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<std::unique_ptr<Thread>> threads_;  // lane i is served by thread i modulo their count
  std::atomic<std::size_t> open_{0};              // the lanes that may be used; the first ones
  std::mutex done_mutex_;
  std::list<Completion> done_;  // guarded by done_mutex_
  bool woken_ = false;          // guarded by done_mutex_
  bool polled_ = false;         // guarded by done_mutex_: a thread polls, and needs no wake-up
  bool silent_ = false;  // guarded by done_mutex_: the completions that a poll found woke no loop
  std::atomic<std::size_t> finished_{0};  // counts completions, for the loop that polls
  WakeupFd wakeup_;
  std::mutex close_mutex_;
  bool closed_ = false;      // guarded by close_mutex_
  std::size_t started_ = 0;  // threads; guarded by close_mutex_
};

}  // namespace aoti
