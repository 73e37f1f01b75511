// Lanes: native threads that run compiled models, one work at a time each, and never touch Python.
//
// Nothing here knows torch or Python. Models, their errors and tensors arrive as function pointers and
// handles, so one build serves every torch, and the tests drive it with a small C library.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "running.hpp"

namespace aoti {

// Makes a descriptor readable while completions wait.
class Bell {
 public:
  Bell();
  ~Bell();
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  void ring();
  void hush();
  void close();  // once no thread rings any more; twice does nothing
  int descriptor() const { return read_end_; }

 private:
  int read_end_ = -1;
  int write_end_ = -1;
};

class Lanes {
 public:
  static constexpr std::size_t kDepth = 2;  // one running, one next

  // One lane for each name; `affinities` is a core for each, or negative. Each has a thread of its name, unless there shall be fewer `threads`:
  // then each of those serves several lanes, which is for devices: it launches what they have, and looks again and again what is done. Throws
  // std::system_error.
  Lanes(Runtime runtime, std::vector<std::string> names, std::vector<int> affinities, int cores, std::size_t threads = 0);
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  std::size_t count() const { return lanes_.size(); }
  int descriptor() const { return bell_.descriptor(); }
  const Runtime& runtime() const { return runtime_; }
  void ring() { bell_.ring(); }

  // False when the lane holds two works already, or is closed; the work is then untouched.
  bool submit(std::size_t lane, Work& work);

  // At most `limit` completions, oldest first; the bell stays rung while there are more.
  std::vector<Completion> drain(std::size_t limit);

  // Spins until a completion waits, or for so long at most; says whether one does. What comes meanwhile does not ring the bell: it is
  // for the caller to drain. One thread at a time.
  bool poll(std::chrono::nanoseconds limit);

  // Waits for what was submitted, then joins the threads. Closing twice does nothing.
  void close();

  // Closes, and gives the descriptor back: it is -1 from then on.
  void hang_up();

 private:
  struct Lane;
  struct Thread;
  void serve(Thread& thread);
  // A lane whose work can begin; null when all is done and the lanes are closing.
  Lane* wait_for_work(Thread& thread);
  void finish(Completion&& completion);

  Runtime runtime_;
  int cores_;
  std::atomic<int> awake_{0};  // threads that run or spin
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<std::unique_ptr<Thread>> threads_;  // each lane's is that of its number, and all beyond the last again
  std::mutex done_mutex_;
  std::vector<Completion> done_;  // guarded by done_mutex_
  bool rung_ = false;             // guarded by done_mutex_
  bool polled_ = false;           // guarded by done_mutex_: somebody looks, and needs no bell
  bool silent_ = false;           // guarded by done_mutex_: what was found by looking rang no bell
  std::atomic<std::size_t> finished_{0};  // counts completions, for the loop that polls
  Bell bell_;
  std::mutex close_mutex_;
  bool closed_ = false;
};

}  // namespace aoti
