// The GIL: released around waits, and regained by no thread once the interpreter ends.
#pragma once

#include <nanobind/nanobind.h>

#ifdef Py_GIL_DISABLED
#error "aoti_sched: free-threaded Python is not supported. Use a build of Python that has the GIL."
#endif

namespace aoti {

// Releases the GIL for as long as it lives.
//
// When the interpreter ends, Python ends each thread that wants the GIL back. In a function that
// promised not to throw, as nanobind's do, that ends the process. So the threads inside are waited
// for before (see `wait_for_detached_threads`), and a thread that enters later never returns.
//
// The counters have no lock: they change only while the GIL is held. This is one of the reasons why
// free-threaded Python is refused above.
class ReleasedGil {
 public:
  ReleasedGil();
  ~ReleasedGil();
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

  // Waits until no thread is left without the GIL. The thread that ends the interpreter calls it,
  // after the lanes are closed.
  static void wait_for_detached_threads();

 private:
  PyThreadState* state_;
  static inline int detached = 0;
  static inline bool ended = false;
  static inline unsigned long last = 0;
};

}  // namespace aoti
