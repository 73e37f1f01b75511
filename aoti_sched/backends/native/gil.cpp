#include "gil.hpp"

#include <thread>

#include <unistd.h>

namespace aoti {

ReleasedGil::ReleasedGil() : state_(nullptr) {
  const bool stays = ended && PyThread_get_thread_ident() != last;
  if (!stays) ++detached;
  state_ = PyEval_SaveThread();
  while (stays) pause();
}

ReleasedGil::~ReleasedGil() {
  PyEval_RestoreThread(state_);
  --detached;
}

void ReleasedGil::wait_for_detached_threads() {
  ended = true;
  last = PyThread_get_thread_ident();
  while (detached > 0) {
    PyThreadState* const state = PyEval_SaveThread();
    std::this_thread::yield();
    PyEval_RestoreThread(state);
  }
}

}  // namespace aoti
