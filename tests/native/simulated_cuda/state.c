/* The lock over all records, the records themselves, and the rules that were broken. */
#include "state.h"

#include <stdarg.h>
#include <stdio.h>

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
struct sim_context contexts[DEVICES];
struct sim_stream streams[MOST_STREAMS];
int most_streams = DEVICES;
int pool_of[MOST_STREAMS];
int pool_uses[MOST_POOLS];
int diverted;
struct block* blocks;
struct sim_graph* graphs;
int most_blocks;
struct pinned pinned[MOST_PINNED];
int pinned_ever;
size_t allocated;
size_t reserved;
size_t limit;
int started;
int held;
int steps;
int microseconds;
int faults;
int waiting;
int spinning;
int refused_waits;
int refusal;
int events;
int kernels;
int most_threads;
int refusals;
int broken[DEVICES];
int breaks_next[DEVICES];
char first_fault[256];
_Thread_local CUcontext current;
_Thread_local int last_error;
_Thread_local int capture_mode;

void fault(const char* format, ...) {
  if (faults++ > 0) return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(first_fault, sizeof first_fault, format, arguments);
  va_end(arguments);
}

struct timespec in_a_minute(void) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 60;
  return until;
}

int device_now(void) { return current == NULL ? 0 : current->device; }

struct sim_stream* at(CUstream stream) { return stream == NULL ? &streams[device_now()] : stream; }

int overlap(const struct sim_range* one, const struct sim_range* other) {
  const char *a = one->start, *b = other->start;
  return (one->written || other->written) && a < b + other->bytes && b < a + one->bytes;
}

void sim_fault(const char* what) {
  pthread_mutex_lock(&mutex);
  fault("%s", what);
  pthread_mutex_unlock(&mutex);
}
