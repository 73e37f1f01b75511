/* What the simulated driver's parts share: its records, and the one lock over them. Each part is a
 * file. Nothing of this is visible outside the library that has it. */
#pragma once

#define _GNU_SOURCE

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "simulated_cuda.h"

#pragma GCC visibility push(hidden)

enum {
  MOST_STREAMS = 256,
  MOST_BLOCKS = 8192,
  MOST_PINNED = 512,
  MOST_OPS = 64,
  MOST_POOLS = 1024,
  DEVICES = 2
};

struct sim_context {
  int device;
};

enum kind { KERNEL, COPY, RECORD, WAIT };

struct op {
  struct op* next;
  enum kind kind;
  uint64_t seq;
  pthread_t giver;
  struct sim_kernel
      kernel;      /* of copies only its ranges: first what is written, then what is read */
  int wait_stream; /* of waits: for which stream to come how far */
  uint64_t wait_seq;
  int pool; /* of the graph it belongs to, or 0 */
};

struct sim_graph {
  struct sim_graph* next;
  int device;
  int executable; /* or only what was recorded */
  int pool;
  int count;
  int invalid;
  uint64_t capture; /* the number of the capture */
  struct sim_stream* origin;
  int mode;           /* of the capture */
  pthread_t recorder; /* the thread that began it */
  struct op ops[MOST_OPS];
};

struct sim_stream {
  int index; /* the first ones are the default ones of the devices */
  int device;
  int priority;
  int alive;
  int blocking;                 /* it and the default stream wait for each other */
  uint64_t born;                /* `seq` when it was made: before that, it was another one */
  uint64_t seq;                 /* of the last piece of work that was given */
  uint64_t done;                /* of the last that is done */
  uint64_t known[MOST_STREAMS]; /* so much of each other stream comes before what is given now */
  struct op* first;
  struct op* last;
  struct sim_graph* recorded; /* what is being recorded */
};

struct sim_event {
  unsigned flags;
  int stream;
  uint64_t seq;
  uint64_t capture; /* in which it was recorded last, or 0 */
  uint64_t known[MOST_STREAMS];
};

struct block {
  char* start; /* null when the memory was given back to the device */
  size_t bytes;
  int device;
  int raw; /* of cudaMalloc, and not of torch's allocator */
  int in_use;
  int stream;                      /* whose pool it is of */
  int pool;                        /* or that of graphs; otherwise 0 */
  uint64_t recorded[MOST_STREAMS]; /* not to be given again before each stream has come so far */
};

struct pinned {
  void* start;
  size_t bytes;
  int device;
};

extern pthread_mutex_t mutex; /* guards everything below */
extern pthread_cond_t changed;
extern struct sim_context contexts[DEVICES];
extern struct sim_stream streams[MOST_STREAMS];
extern int most_streams;
extern int pool_of[MOST_STREAMS]; /* the pool of what is allocated on a stream now; 0: its own */
extern int pool_uses[MOST_POOLS];
extern int diverted; /* streams whose memory comes from a pool now */
extern struct block* blocks;
extern struct sim_graph* graphs; /* that are there */
extern int most_blocks;
extern struct pinned pinned[MOST_PINNED];
extern int pinned_ever;
extern size_t allocated;
extern size_t reserved;
extern size_t limit;
extern int started;
extern int held;
extern int steps;
extern int microseconds;
extern int faults;
extern int waiting;
extern int spinning;
extern int refused_waits;
extern int refusal;
extern int events;
extern int kernels;
extern int most_threads;
extern int refusals;
extern int broken[DEVICES];
extern int breaks_next[DEVICES];
extern char first_fault[256];
extern _Thread_local CUcontext current;
extern _Thread_local int last_error;
extern _Thread_local int capture_mode; /* of the thread: 0 global, 1 thread-local, 2 relaxed */

/* state.c */
void fault(const char* format, ...); /* the mutex is held */
struct timespec in_a_minute(void);
int device_now(void);
struct sim_stream* at(CUstream stream);
int overlap(const struct sim_range* one, const struct sim_range* other);

/* device.c */
void* run_device(void* nothing); /* the thread that is the device */
struct sim_stream* next_stream(void);
int give(CUstream handle, struct op op);

/* streams.c */
int open_stream(CUstream* made, int blocking, int priority);
int wait_for(struct sim_stream* stream, uint64_t seq, int* counted);

/* capture.c; the mutex is held */
int is_forbidden(void);
int spoils_by_default_stream(const struct sim_stream* stream);
int spoils_by_event(const struct sim_event* event);
int waits_for_captured(struct sim_stream* stream, const struct sim_event* event);

/* allocator.c */
struct block* block_of(const void* address);
struct block* new_block(size_t bytes);
size_t rounded_up(size_t bytes);

#pragma GCC visibility pop
