#define _GNU_SOURCE
#include "simulated_cuda.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST_STREAMS = 256, MOST_BLOCKS = 8192, MOST_PINNED = 512, MOST_OPS = 64, MOST_POOLS = 1024, DEVICES = 2 };

struct sim_context {
  int device;
};

enum kind { KERNEL, COPY, RECORD, WAIT };

struct op {
  struct op* next;
  enum kind kind;
  uint64_t seq;
  pthread_t giver;
  struct sim_kernel kernel; /* of copies, only its ranges: what is written first, then what is read */
  int wait_stream;          /* of waits: for which stream to come how far */
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
  int mode;           /* of the capture */
  pthread_t recorder; /* the thread that began it */
  struct op ops[MOST_OPS];
};

struct sim_stream {
  int index; /* the first ones are the default ones of the devices */
  int device;
  int priority;
  int alive;
  uint64_t seq;                 /* of the last piece of work that was given */
  uint64_t done;                /* of the last that is done */
  uint64_t known[MOST_STREAMS]; /* what is given from now on comes after this much of each other stream */
  struct op* first;
  struct op* last;
  struct sim_graph* recorded; /* what is being recorded */
};

struct sim_event {
  unsigned flags;
  int stream;
  uint64_t seq;
  uint64_t known[MOST_STREAMS];
};

struct block {
  char* start; /* null when the memory was given back to the device */
  size_t bytes;
  int device;
  int raw; /* of cudaMalloc, and not of torch's allocator */
  int in_use;
  int stream; /* whose pool it is of */
  int pool;   /* or that of graphs; otherwise 0 */
  uint64_t recorded[MOST_STREAMS]; /* not to be given again before each stream has come so far */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards everything below */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct sim_context contexts[DEVICES];
static struct sim_stream streams[MOST_STREAMS];
static int most_streams = DEVICES;
static int pool_of[MOST_STREAMS]; /* what is allocated on a stream comes from this pool now; 0 for its own */
static int pool_uses[MOST_POOLS];
static int diverted; /* streams whose memory comes from a pool now */
static struct block* blocks;
static struct sim_graph* graphs; /* that are there */
static int most_blocks;
static struct {
  void* start;
  size_t bytes;
  int device;
} pinned[MOST_PINNED];
static size_t allocated, reserved, limit;
static int started, held, steps, microseconds, faults, waiting, spinning, refused_waits, refusal, events, kernels, most_threads, refusals;
static int broken[DEVICES], breaks_next[DEVICES];
static char first_fault[256];
static _Thread_local CUcontext current;
static _Thread_local int last_error;
static _Thread_local int capture_mode; /* of the thread: 0 global, 1 thread-local, 2 relaxed */

static void fault(const char* format, ...) {
  if (faults++ > 0) return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(first_fault, sizeof first_fault, format, arguments);
  va_end(arguments);
}

static struct timespec in_a_minute(void) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 60;
  return until;
}

static int device_now(void) { return current == NULL ? 0 : current->device; }

static struct sim_stream* at(CUstream stream) { return stream == NULL ? &streams[device_now()] : stream; }

static int overlap(const struct sim_range* one, const struct sim_range* other) {
  const char *a = one->start, *b = other->start;
  return (one->written || other->written) && a < b + other->bytes && b < a + one->bytes;
}

static struct block* block_of(const void* address) {
  for (int i = 0; i < most_blocks; ++i) {
    if (blocks[i].start == NULL) continue;
    if ((char*)address >= blocks[i].start && (char*)address < blocks[i].start + blocks[i].bytes) return &blocks[i];
  }
  return NULL;
}

static int is_pinned(const void* address, size_t bytes) {
  for (int i = 0; i < MOST_PINNED; ++i) {
    const char* start = pinned[i].start;
    if (start != NULL && (char*)address >= start && (char*)address + bytes <= start + pinned[i].bytes) return 1;
  }
  return 0;
}

/* --- the device ------------------------------------------------------------------------------------------------- */

static struct sim_stream* next_stream(void) {
  static int turn;
  for (int i = 0; i < most_streams; ++i) {
    struct sim_stream* stream = &streams[(turn + i) % most_streams];
    const struct op* op = stream->first;
    if (op == NULL) continue;
    if (op->kind == WAIT && streams[op->wait_stream].done < op->wait_seq && !broken[stream->device]) continue;
    turn = stream->index + 1;
    return stream;
  }
  return NULL;
}

static void perform(struct op* op, int on) {
  if (op->kind == KERNEL) {
    if (breaks_next[on]) {
      broken[on] = breaks_next[on];
      breaks_next[on] = 0;
    }
    ++kernels;
  }
  const int works = !broken[on];
  const int sleeps = microseconds;
  for (int i = 0; works && i < op->kernel.ranges; ++i) {
    const struct sim_range* range = &op->kernel.range[i];
    if (op->kind == KERNEL && range->bytes > 0 && block_of(range->start) == NULL) fault("a kernel uses no device memory");
  }
  pthread_mutex_unlock(&mutex);
  if (sleeps > 0) {
    const struct timespec time = {sleeps / 1000000, sleeps % 1000000 * 1000L};
    nanosleep(&time, NULL);
  }
  if (works && op->kind == COPY) {
    memcpy((void*)op->kernel.range[0].start, op->kernel.range[1].start, op->kernel.range[0].bytes);
  }
  if (op->kind == KERNEL) {
    if (works) op->kernel.run(op->kernel.argument);
    if (op->kernel.done != NULL) op->kernel.done(op->kernel.argument);
  }
  pthread_mutex_lock(&mutex);
}

static void* device(void* nothing) {
  (void)nothing;
  pthread_mutex_lock(&mutex);
  for (;;) {
    struct sim_stream* stream = held && steps == 0 ? NULL : next_stream();
    if (stream == NULL) {
      pthread_cond_wait(&changed, &mutex);
      continue;
    }
    struct op* op = stream->first;
    perform(op, stream->device);
    stream->first = op->next;
    if (stream->first == NULL) stream->last = NULL;
    stream->done = op->seq;
    if (steps > 0) --steps;
    free(op);
    pthread_cond_broadcast(&changed);
  }
  return NULL;
}

/* Is what the other stream still has to do ordered before what this one is given now? */
static void check_order(const struct sim_stream* stream, const struct op* given) {
  for (int i = 0; i < most_streams; ++i) {
    if (i == stream->index) continue;
    for (const struct op* op = streams[i].first; op != NULL; op = op->next) {
      if (op->seq <= stream->known[i]) continue;
      for (int a = 0; a < given->kernel.ranges; ++a) {
        for (int b = 0; b < op->kernel.ranges; ++b) {
          if (overlap(&given->kernel.range[a], &op->kernel.range[b])) {
            fault("streams %d and %d use the same memory, and nothing orders them", stream->index, i);
          }
        }
      }
    }
  }
  for (int a = 0; a < given->kernel.ranges; ++a) {
    const struct block* block = block_of(given->kernel.range[a].start);
    if (block == NULL || block->in_use || (block->pool != 0 && block->pool == given->pool)) continue;
    fault("memory is used that was given back");
  }
}

/* Whose work waits, beside the calling thread's? */
static void count_threads(void) {
  pthread_t givers[MOST_STREAMS] = {pthread_self()};
  int count = 1;
  for (int i = 0; i < most_streams; ++i) {
    for (const struct op* op = streams[i].first; op != NULL && count < MOST_STREAMS; op = op->next) {
      int known = op->kind != KERNEL && op->kind != COPY;
      for (int t = 0; t < count; ++t) known |= pthread_equal(givers[t], op->giver);
      if (!known) givers[count++] = op->giver;
    }
  }
  if (count > most_threads) most_threads = count;
}

static int give(CUstream handle, struct op op) {
  struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  if (current == NULL && handle == NULL) fault("the default stream is used without a context");
  int error = broken[stream->device];
  if (error == 0 && handle == NULL && current == NULL) error = CUDA_ERROR_INVALID_CONTEXT;
  if (error == 0 && handle != NULL && !stream->alive) {
    fault("a stream is used that is gone");
    error = CUDA_ERROR_INVALID_VALUE;
  }
  if (error == 0 && stream->recorded != NULL) {
    struct sim_graph* graph = stream->recorded;
    if ((op.kind == KERNEL || op.kind == COPY) && graph->count < MOST_OPS) {
      graph->ops[graph->count++] = op;
    } else {
      graph->invalid = 1;
      error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    pthread_mutex_unlock(&mutex);
    return error;
  }
  if (error == 0) {
    check_order(stream, &op);
    struct op* given = malloc(sizeof *given);
    *given = op;
    given->giver = pthread_self();
    given->seq = ++stream->seq;
    given->next = NULL;
    if (stream->last != NULL) stream->last->next = given;
    if (stream->first == NULL) stream->first = given;
    stream->last = given;
    if (op.kind == KERNEL || op.kind == COPY) count_threads();
    pthread_cond_broadcast(&changed);
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

int sim_launch(CUstream stream, const struct sim_kernel* kernel) {
  const int error = give(stream, (struct op){.kind = KERNEL, .kernel = *kernel});
  if (error != 0 && kernel->done != NULL) kernel->done(kernel->argument);
  return error;
}

/* --- graphs ----------------------------------------------------------------------------------------------------- */

/* Which captures forbid the calling thread what may be unsafe while they go on? They are spoilt by it. See the driver's
 * documentation of cuThreadExchangeStreamCaptureMode. */
static int is_forbidden(void) {
  int found = 0;
  if (capture_mode == 2) return 0;
  for (int i = 0; i < most_streams; ++i) {
    struct sim_graph* recorded = streams[i].recorded;
    if (recorded == NULL || recorded->mode == 2) continue;
    const int own = pthread_equal(recorded->recorder, pthread_self());
    if (!own && !(capture_mode == 0 && recorded->mode == 0)) continue;
    recorded->invalid = found = 1;
  }
  refusals += found;
  return found;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return CUDA_SUCCESS;
}

int cuStreamBeginCapture_v2(CUstream handle, int mode) {
  pthread_mutex_lock(&mutex);
  struct sim_stream* stream = at(handle);
  int error = broken[stream->device];
  if (stream->recorded != NULL || handle == NULL) fault("a stream is recorded twice, or it is the default one");
  if (mode == 1 && diverted == 0) fault("a run is recorded whose memory is of no pool");
  if (error == 0) {
    stream->recorded = calloc(1, sizeof *stream->recorded);
    stream->recorded->pool = pool_of[stream->index];
    stream->recorded->mode = mode;
    stream->recorded->device = stream->device;
    stream->recorded->recorder = pthread_self();
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

static void forget_ops(struct sim_graph* graph) {
  for (int i = 0; i < graph->count; ++i) {
    if (graph->ops[i].kernel.done != NULL) graph->ops[i].kernel.done(graph->ops[i].kernel.argument);
  }
  free(graph);
}

int cuStreamEndCapture(CUstream handle, CUgraph* made) {
  pthread_mutex_lock(&mutex);
  struct sim_stream* stream = at(handle);
  struct sim_graph* graph = stream->recorded;
  int error = broken[stream->device];
  *made = NULL;
  if (graph == NULL) {
    fault("a recording ends that was not begun");
    error = CUDA_ERROR_INVALID_VALUE;
  } else {
    if (error == 0 && graph->invalid) error = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    stream->recorded = NULL;
    if (error == 0) {
      graph->next = graphs;
      graphs = *made = graph;
    }
  }
  pthread_mutex_unlock(&mutex);
  if (error != 0 && graph != NULL) forget_ops(graph);
  return error;
}

/* Here what was recorded becomes what is launched: what was recorded is empty then. */
int cuGraphInstantiateWithFlags(CUgraphExec* made, CUgraph graph, unsigned long long flags) {
  (void)flags;
  pthread_mutex_lock(&mutex);
  *made = NULL;
  const int error = broken[device_now()];
  if (error == 0) {
    struct sim_graph* executable = malloc(sizeof *executable);
    *executable = *graph;
    executable->executable = 1;
    graph->next = executable;
    graph->count = 0;
    *made = executable;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

static int forget(struct sim_graph* graph) {
  int found = 0;
  pthread_mutex_lock(&mutex);
  for (struct sim_graph** place = &graphs; *place != NULL; place = &(*place)->next) {
    if (*place != graph) continue;
    found = 1;
    *place = graph->next;
    break;
  }
  if (!found) fault("a graph is forgotten that is gone");
  for (int i = 0; found && i < most_streams; ++i) {
    if (broken[streams[i].device]) continue;
    for (const struct op* op = streams[i].first; op != NULL; op = op->next) {
      for (int k = 0; k < graph->count; ++k) {
        if (op->kind == KERNEL && op->kernel.argument == graph->ops[k].kernel.argument) fault("a graph is forgotten that runs");
      }
    }
  }
  pthread_mutex_unlock(&mutex);
  if (found) forget_ops(graph);
  return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

int cuGraphDestroy(CUgraph graph) { return forget(graph); }
int cuGraphExecDestroy(CUgraphExec graph) { return forget(graph); }

int cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  int found = 0;
  pthread_mutex_lock(&mutex);
  for (const struct sim_graph* one = graphs; one != NULL; one = one->next) found |= one == graph && one->executable;
  if (!found) fault("a graph is launched that is gone");
  if (current == NULL) fault("a graph is launched without a context");
  pthread_mutex_unlock(&mutex);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  int error = CUDA_SUCCESS;
  for (int i = 0; i < graph->count && error == CUDA_SUCCESS; ++i) {
    struct op op = graph->ops[i];
    op.kernel.done = NULL; /* its argument is the graph's */
    op.pool = graph->pool;
    error = give(stream, op);
  }
  return error;
}

int sim_is_recording(CUstream handle) {
  pthread_mutex_lock(&mutex);
  const int is = at(handle)->recorded != NULL;
  pthread_mutex_unlock(&mutex);
  return is;
}

void sim_fault(const char* what) {
  pthread_mutex_lock(&mutex);
  fault("%s", what);
  pthread_mutex_unlock(&mutex);
}

/* --- the driver ------------------------------------------------------------------------------------------------- */

int cuInit(unsigned flags) {
  (void)flags;
  pthread_mutex_lock(&mutex);
  if (!started) {
    started = 1;
    for (int i = 0; i < DEVICES; ++i) contexts[i].device = i;
    for (int i = 0; i < MOST_STREAMS; ++i) streams[i].index = i;
    for (int i = 0; i < DEVICES; ++i) {
      streams[i].alive = 1;
      streams[i].device = i;
    }
    blocks = calloc(MOST_BLOCKS, sizeof *blocks);
    pthread_t thread;
    pthread_create(&thread, NULL, device, NULL);
    pthread_detach(thread);
  }
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

int cuDeviceGetCount(int* count) {
  *count = DEVICES;
  return CUDA_SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

int cuDeviceGetName(char* name, int bytes, int device) {
  snprintf(name, (size_t)bytes, "Simulated %d", device);
  return CUDA_SUCCESS;
}

int cuDevicePrimaryCtxRetain(CUcontext* context, int device) {
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  return CUDA_SUCCESS;
}

int cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

int cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

int cuStreamCreateWithPriority(CUstream* made, unsigned flags, int priority) {
  int error = current == NULL ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&mutex);
  if (flags != 1) fault("a stream waits for the default one: it was made without CU_STREAM_NON_BLOCKING");
  for (int i = DEVICES; current != NULL && i < MOST_STREAMS; ++i) {
    if (streams[i].alive || streams[i].first != NULL) continue;
    error = broken[device_now()];
    if (error != 0) break;
    streams[i].alive = 1;
    streams[i].device = device_now();
    streams[i].priority = priority;
    if (i >= most_streams) most_streams = i + 1;
    *made = &streams[i];
    break;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuStreamCreate(CUstream* made, unsigned flags) { return cuStreamCreateWithPriority(made, flags, 0); }

int sim_priority(CUstream stream) { return stream->priority; }

int cuStreamDestroy_v2(CUstream stream) {
  pthread_mutex_lock(&mutex);
  if (stream->first != NULL && !broken[stream->device]) fault("a stream is destroyed that has work to do");
  stream->alive = 0;
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

/* Waits until the stream has come so far. */
static int wait_for(struct sim_stream* stream, uint64_t seq, int* counted) {
  const struct timespec until = in_a_minute();
  int waited_in_vain = 0;
  pthread_mutex_lock(&mutex);
  if (refused_waits > 0) {
    --refused_waits;
    const int refused = refusal;
    pthread_mutex_unlock(&mutex);
    return refused;
  }
  if (stream->recorded != NULL) {
    stream->recorded->invalid = 1;
    pthread_mutex_unlock(&mutex);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (is_forbidden()) {
    pthread_mutex_unlock(&mutex);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  ++waiting;
  ++*counted;
  pthread_cond_broadcast(&changed);
  while (stream->done < seq && !broken[stream->device] && !waited_in_vain) {
    waited_in_vain = pthread_cond_timedwait(&changed, &mutex, &until);
  }
  --waiting;
  if (waited_in_vain) fault("nobody let the device go on");
  const int error = waited_in_vain ? CUDA_ERROR_UNKNOWN : broken[stream->device];
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuStreamSynchronize(CUstream handle) {
  struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  if (current == NULL) fault("a stream is waited for without a context");
  const uint64_t seq = stream->seq;
  pthread_mutex_unlock(&mutex);
  return wait_for(stream, seq, &spinning);
}

int cuCtxSynchronize(void) {
  int error = CUDA_SUCCESS;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < most_streams; ++i) {
    if (streams[i].recorded == NULL) continue;
    streams[i].recorded->invalid = 1;
    error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  pthread_mutex_unlock(&mutex);
  for (int i = 0; i < MOST_STREAMS && error == CUDA_SUCCESS; ++i) error = cuStreamSynchronize(&streams[i]);
  return error;
}

int cuStreamQuery(CUstream handle) {
  const struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  if (current == NULL && handle == NULL) fault("the default stream is asked without a context");
  int error = broken[stream->device];
  if (error == 0) error = stream->done < stream->seq ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
  if (stream->recorded != NULL) stream->recorded->invalid = 1;
  if (stream->recorded != NULL || is_forbidden()) error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (refused_waits > 0 && handle != NULL) {
    --refused_waits;
    error = refusal;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuEventCreate(CUevent* made, unsigned flags) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  pthread_mutex_lock(&mutex);
  const int error = broken[device_now()];
  if (error == 0) {
    *made = calloc(1, sizeof **made);
    (*made)->flags = flags;
    ++events;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuEventQuery(CUevent event) {
  const struct sim_stream* stream = &streams[event->stream];
  pthread_mutex_lock(&mutex);
  int error = broken[stream->device];
  if (error == 0) error = stream->done < event->seq ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
  if (is_forbidden()) error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuEventSynchronize(CUevent event) {
  int blocking = 0;
  return wait_for(&streams[event->stream], event->seq, event->flags & 1 ? &blocking : &spinning);
}

int cuEventDestroy_v2(CUevent event) {
  pthread_mutex_lock(&mutex);
  --events;
  pthread_mutex_unlock(&mutex);
  free(event);
  return CUDA_SUCCESS;
}

int cuEventRecord(CUevent event, CUstream handle) {
  const int error = give(handle, (struct op){.kind = RECORD});
  if (error != 0) return error;
  const struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  event->stream = stream->index;
  event->seq = stream->seq;
  memcpy(event->known, stream->known, sizeof event->known);
  event->known[stream->index] = stream->seq;
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

int cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
  (void)flags;
  struct sim_stream* stream = at(handle);
  const int error = give(handle, (struct op){.kind = WAIT, .wait_stream = event->stream, .wait_seq = event->seq});
  if (error != 0) return error;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < MOST_STREAMS; ++i) {
    if (event->known[i] > stream->known[i]) stream->known[i] = event->known[i];
  }
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

int cuMemAllocHost_v2(void** made, size_t bytes) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  pthread_mutex_lock(&mutex);
  int error = broken[device_now()];
  if (error == 0 && is_forbidden()) error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  for (int i = 0; i < MOST_PINNED && error == 0; ++i) {
    if (pinned[i].start != NULL) continue;
    pinned[i].start = *made = malloc(bytes);
    pinned[i].bytes = bytes;
    pinned[i].device = device_now();
    break;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuMemFreeHost(void* memory) {
  pthread_mutex_lock(&mutex);
  if (is_forbidden()) {
    pthread_mutex_unlock(&mutex);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  for (int i = 0; i < MOST_PINNED; ++i) {
    if (pinned[i].start != memory) continue;
    const struct sim_range all = {memory, pinned[i].bytes, 1};
    for (int j = 0; j < most_streams; ++j) {
      for (const struct op* op = streams[j].first; op != NULL; op = op->next) {
        for (int k = 0; k < op->kernel.ranges; ++k) {
          if (overlap(&all, &op->kernel.range[k]) && !broken[streams[j].device]) fault("pinned memory is freed that a copy still uses");
        }
      }
    }
    pinned[i].start = NULL;
    free(memory);
    break;
  }
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

static int copy(void* to, const void* from, size_t bytes, CUstream stream) {
  struct op op = {.kind = COPY, .kernel = {.ranges = 2, .range = {{to, bytes, 1}, {from, bytes, 0}}}};
  return give(stream, op);
}

static void must_be(int holds, const char* what) {
  if (holds) return;
  pthread_mutex_lock(&mutex);
  fault("%s", what);
  pthread_mutex_unlock(&mutex);
}

static int lies(int pinned_memory, const void* address, size_t bytes) {
  pthread_mutex_lock(&mutex);
  const int it_does = pinned_memory ? is_pinned(address, bytes) : block_of(address) != NULL;
  pthread_mutex_unlock(&mutex);
  return it_does;
}

int cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  must_be(lies(1, from, bytes), "a copy to the device starts from memory that is not pinned");
  must_be(lies(0, (void*)to, bytes), "a copy to the device ends in no device memory");
  return copy((void*)to, from, bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  must_be(lies(1, to, bytes), "a copy from the device ends in memory that is not pinned");
  must_be(lies(0, (void*)from, bytes), "a copy from the device starts in no device memory");
  return copy(to, (void*)from, bytes, stream);
}

int cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy((void*)to, (void*)from, bytes, stream);
}

int cuGetErrorName(int error, const char** words) {
  *words = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}

int cuGetErrorString(int error, const char** words) {
  *words = error == CUDA_ERROR_ILLEGAL_ADDRESS            ? "an illegal memory access was encountered"
           : error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing"
           : error == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED ? "operation failed due to a previous error during capture"
                                                            : "unknown error";
  return CUDA_SUCCESS;
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

static int is_free_for(const struct block* block, int stream, int pool) {
  if (block->start == NULL || block->raw || block->in_use || block->pool != pool) return 0;
  if (pool == 0 && block->stream != stream) return 0;
  for (int i = 0; i < most_streams; ++i) {
    /* As torch, which gives no such block back while memory comes from a pool. */
    if (block->recorded[i] > 0 && (diverted > 0 || streams[i].done < block->recorded[i])) return 0;
  }
  return 1;
}

/* Gives the device back what torch keeps and no tensor has. What a graph's pool keeps stays while the pool is used. */
static void release_cached(void) {
  for (int i = 0; i < most_blocks; ++i) {
    struct block* block = &blocks[i];
    if (block->pool != 0 && pool_uses[block->pool] > 0) continue;
    if (!is_free_for(block, block->stream, block->pool)) continue;
    free(block->start);
    block->start = NULL;
    reserved -= block->bytes;
  }
}

static struct block* new_block(size_t bytes) {
  struct block* made = NULL;
  for (int i = 0; i < most_blocks && made == NULL; ++i) made = blocks[i].start == NULL ? &blocks[i] : NULL;
  if (made == NULL && most_blocks < MOST_BLOCKS) made = &blocks[most_blocks++];
  if (made == NULL) return NULL;
  memset(made, 0, sizeof *made);
  made->start = malloc(bytes);
  made->bytes = bytes;
  made->in_use = 1;
  reserved += bytes;
  memset(made->start, 0xab, bytes);
  return made;
}

static size_t rounded_up(size_t bytes) { return (bytes + 511) / 512 * 512 + (bytes == 0) * 512; }

void* sim_allocate(size_t bytes, CUstream handle) {
  const int stream = at(handle)->index;
  const size_t rounded = rounded_up(bytes);
  struct block* found = NULL;
  cuInit(0);
  pthread_mutex_lock(&mutex);
  const int pool = pool_of[stream];
  for (int i = 0; i < most_blocks && found == NULL; ++i) {
    if (blocks[i].bytes == rounded && is_free_for(&blocks[i], stream, pool)) found = &blocks[i];
  }
  /* Torch itself lets memory grow while its own stream is recorded. */
  const int forbidden = found == NULL && at(handle)->recorded == NULL && is_forbidden();
  if (found == NULL && !forbidden && !broken[at(handle)->device]) {
    if (limit > 0 && reserved + rounded > limit && diverted == 0) release_cached();
    if (limit == 0 || reserved + rounded <= limit) found = new_block(rounded);
    if (found != NULL) {
      found->stream = stream;
      found->pool = pool;
      found->device = at(handle)->device;
    }
  }
  if (found != NULL) {
    found->in_use = 1;
    memset(found->recorded, 0, sizeof found->recorded);
    allocated += rounded;
  }
  pthread_mutex_unlock(&mutex);
  return found == NULL ? NULL : found->start;
}

void sim_empty_cache(void) {
  pthread_mutex_lock(&mutex);
  if (diverted > 0) fault("the cache is emptied while a run is recorded");
  if (!is_forbidden()) release_cached();
  pthread_mutex_unlock(&mutex);
}

int sim_begin_pool(CUstream handle, int pool) {
  pthread_mutex_lock(&mutex);
  const int there = at(handle)->index;
  const int begins = pool > 0 && pool < MOST_POOLS && pool_of[there] == 0;
  if (begins) {
    pool_of[there] = pool;
    ++pool_uses[pool];
    ++diverted;
  }
  pthread_mutex_unlock(&mutex);
  return begins;
}

int sim_end_pool(int pool) {
  int ended = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < most_streams; ++i) {
    if (pool_of[i] != pool) continue;
    pool_of[i] = 0;
    --diverted;
    ended = 1;
  }
  pthread_mutex_unlock(&mutex);
  return ended;
}

int sim_release_pool(int pool) {
  pthread_mutex_lock(&mutex);
  const int used = pool_uses[pool] > 0;
  if (used) --pool_uses[pool];
  pthread_mutex_unlock(&mutex);
  return used;
}

/* --- memory outside torch's allocator ----------------------------------------------------------------------------- */

int cudaGetLastError(void) {
  const int error = last_error;
  last_error = 0;
  return error;
}

int sim_device_of(const void* memory) {
  pthread_mutex_lock(&mutex);
  const struct block* block = block_of(memory);
  const int device = block == NULL ? 0 : block->device;
  pthread_mutex_unlock(&mutex);
  return device;
}

void sim_runtime_call(int device) {
  pthread_mutex_lock(&mutex);
  if (current == NULL) {
    fault("the runtime is called without a context, and makes one on device 0");
  } else if (current->device != device) {
    fault("the runtime is called in the context of device %d, not of device %d", current->device, device);
  }
  pthread_mutex_unlock(&mutex);
}

void* sim_malloc(size_t bytes, int device) {
  struct block* made = NULL;
  const size_t rounded = rounded_up(bytes);
  sim_runtime_call(device);
  pthread_mutex_lock(&mutex);
  int error = broken[device];
  if (error == 0 && is_forbidden()) error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (error == 0 && limit > 0 && reserved + rounded > limit) error = CUDA_ERROR_OUT_OF_MEMORY;
  if (error == 0) {
    made = new_block(rounded);
    made->raw = 1;
    made->device = device;
    allocated += rounded;
  } else {
    last_error = error;
  }
  pthread_mutex_unlock(&mutex);
  return made == NULL ? NULL : made->start;
}

int sim_mfree(void* memory, int device) {
  sim_runtime_call(device);
  pthread_mutex_lock(&mutex);
  struct block* block = block_of(memory);
  int error = broken[device];
  if (error != 0) {
    fault("memory of a lost device is freed");
  } else if (block == NULL || !block->raw) {
    fault("memory is freed that is not there");
  } else if (is_forbidden()) {
    error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  } else {
    const struct sim_range all = {block->start, block->bytes, 1};
    for (int i = 0; i < most_streams; ++i) {
      for (const struct op* op = streams[i].first; op != NULL; op = op->next) {
        for (int k = 0; k < op->kernel.ranges; ++k) {
          if (overlap(&all, &op->kernel.range[k])) fault("memory is freed that stream %d still has to use", i);
        }
      }
    }
    free(block->start);
    block->start = NULL;
    allocated -= block->bytes;
    reserved -= block->bytes;
  }
  if (error != 0) last_error = error;
  pthread_mutex_unlock(&mutex);
  return error;
}

/* --- torch's allocator, further --------------------------------------------------------------------------------- */

void sim_record_use(void* memory, CUstream handle) {
  const struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  struct block* block = block_of(memory);
  if (block == NULL) {
    fault("a use is recorded of no device memory");
  } else {
    block->recorded[stream->index] = UINT64_MAX; /* until it is given back: what comes before that counts */
  }
  pthread_mutex_unlock(&mutex);
}

void sim_free(void* memory) {
  pthread_mutex_lock(&mutex);
  struct block* block = block_of(memory);
  if (block == NULL || !block->in_use) {
    fault("device memory is given back twice");
    pthread_mutex_unlock(&mutex);
    return;
  }
  const struct sim_range all = {block->start, block->bytes, 1};
  for (int i = 0; i < most_streams; ++i) {
    if (block->recorded[i] == UINT64_MAX) {
      block->recorded[i] = streams[i].seq;
      continue;
    }
    if ((i == block->stream && block->pool == 0) || broken[streams[i].device]) continue;
    for (const struct op* op = streams[i].first; op != NULL; op = op->next) {
      for (int k = 0; k < op->kernel.ranges; ++k) {
        if (overlap(&all, &op->kernel.range[k])) fault("memory is given back that stream %d still has to use", i);
      }
    }
  }
  block->in_use = 0;
  allocated -= block->bytes;
  pthread_mutex_unlock(&mutex);
}

size_t sim_kept(CUstream handle) {
  size_t kept = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < most_blocks; ++i) {
    const struct block* block = &blocks[i];
    if (block->start != NULL && !block->raw && block->stream == at(handle)->index) kept += block->bytes;
  }
  pthread_mutex_unlock(&mutex);
  return kept;
}

size_t sim_allocated(void) {
  pthread_mutex_lock(&mutex);
  const size_t now = allocated;
  pthread_mutex_unlock(&mutex);
  return now;
}

size_t sim_reserved(void) {
  pthread_mutex_lock(&mutex);
  const size_t now = reserved;
  pthread_mutex_unlock(&mutex);
  return now;
}

/* --- the test's hand -------------------------------------------------------------------------------------------- */

#define SET(statement)           \
  pthread_mutex_lock(&mutex);    \
  statement;                     \
  pthread_cond_broadcast(&changed); \
  pthread_mutex_unlock(&mutex)

#define GET(name, expression)   \
  int name(void) {              \
    pthread_mutex_lock(&mutex); \
    const int now = expression; \
    pthread_mutex_unlock(&mutex); \
    return now;                 \
  }

void sim_memory_limit(size_t bytes) { SET(limit = bytes); }
void sim_refuse_waits(int count, int error) { SET(refused_waits = count; refusal = error); }
GET(sim_refused_waits, refused_waits)
void sim_hold(void) { SET(held = 1); }
void sim_go(void) { SET(held = 0); }
void sim_take(int time) { SET(microseconds = time); }
void sim_break(int error, int device) { SET(breaks_next[device] = error); }
GET(sim_waiting, waiting)
GET(sim_spinning, spinning)
GET(sim_diverted, diverted)
GET(sim_refusals, refusals)
GET(sim_most_streams, most_streams)
CUstream sim_stream(int number) { return &streams[number]; }
GET(sim_events, events)
GET(sim_kernels, kernels)
GET(sim_most_threads, most_threads)

static int all_pending(void) {
  int pending = 0;
  for (int i = 0; i < most_streams; ++i) pending += (int)(streams[i].seq - streams[i].done);
  return pending;
}

static int alive(void) {
  int count = 0;
  for (int i = DEVICES; i < most_streams; ++i) count += streams[i].alive;
  return count;
}

static int count_pinned(void) {
  int count = 0;
  for (int i = 0; i < MOST_PINNED; ++i) count += pinned[i].start != NULL;
  return count;
}

GET(sim_streams, alive())
static int count_graphs(void) {
  int count = 0;
  for (const struct sim_graph* graph = graphs; graph != NULL; graph = graph->next) ++count;
  return count;
}

GET(sim_graphs, count_graphs())
GET(sim_pinned, count_pinned())

static int wait_until(int (*count)(void), int least) {
  const struct timespec until = in_a_minute();
  int waited_in_vain = 0;
  pthread_mutex_lock(&mutex);
  while (count() < least && !waited_in_vain) waited_in_vain = pthread_cond_timedwait(&changed, &mutex, &until);
  pthread_mutex_unlock(&mutex);
  return !waited_in_vain;
}

static int waiting_now(void) { return waiting; }
int sim_wait_until_pending(int count) { return wait_until(all_pending, count); }
int sim_wait_until_waiting(int count) { return wait_until(waiting_now, count); }

int sim_step(void) {
  pthread_mutex_lock(&mutex);
  const int can = next_stream() != NULL;
  if (can) {
    ++steps;
    pthread_cond_broadcast(&changed);
    while (steps > 0) pthread_cond_wait(&changed, &mutex);
  }
  pthread_mutex_unlock(&mutex);
  return can;
}

int sim_pending(CUstream stream) {
  pthread_mutex_lock(&mutex);
  const int pending = (int)(at(stream)->seq - at(stream)->done);
  pthread_mutex_unlock(&mutex);
  return pending;
}

int sim_faults(const char** first) {
  pthread_mutex_lock(&mutex);
  const int count = faults;
  if (first != NULL) *first = first_fault;
  pthread_mutex_unlock(&mutex);
  return count;
}

void sim_repair(void) {
  pthread_mutex_lock(&mutex);
  held = microseconds = faults = kernels = most_threads = spinning = refusals = refused_waits = 0;
  limit = 0;
  for (int i = 0; i < DEVICES; ++i) {
    const int was_lost = broken[i];
    broken[i] = breaks_next[i] = 0;
    for (int j = 0; was_lost && j < most_blocks; ++j) { /* it ended with the process that had it */
      struct block* block = &blocks[j];
      if (block->start == NULL || !block->raw || block->device != i) continue;
      block->start = NULL;
      allocated -= block->bytes;
      reserved -= block->bytes;
    }
    for (int j = 0; was_lost && j < MOST_PINNED; ++j) {
      if (pinned[j].device == i) pinned[j].start = NULL;
    }
    for (struct sim_graph** place = &graphs; was_lost && *place != NULL;) {
      if ((*place)->device == i) {
        *place = (*place)->next;
      } else {
        place = &(*place)->next;
      }
    }
  }
  first_fault[0] = 0;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&mutex);
}
