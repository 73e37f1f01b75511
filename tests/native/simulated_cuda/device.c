/* The device: a thread that does the work of all streams, and what is checked when work is given.
 */
#include "state.h"

#include <stdlib.h>
#include <string.h>

struct sim_stream* next_stream(void) {
  static int turn;
  for (int i = 0; i < most_streams; ++i) {
    struct sim_stream* stream = &streams[(turn + i) % most_streams];
    const struct op* op = stream->first;
    if (op == NULL) continue;
    if (op->kind == WAIT && streams[op->wait_stream].done < op->wait_seq && !broken[stream->device])
      continue;
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
    if (op->kind == KERNEL && range->bytes > 0 && block_of(range->start) == NULL)
      fault("a kernel uses no device memory");
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

void* run_device(void* nothing) {
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
            fault("streams %d and %d use the same memory, and nothing orders them", stream->index,
                  i);
          }
        }
      }
    }
  }
  for (int a = 0; a < given->kernel.ranges; ++a) {
    const struct block* block = block_of(given->kernel.range[a].start);
    if (block == NULL || block->in_use || (block->pool != 0 && block->pool == given->pool))
      continue;
    fault("memory is used that was given back");
  }
}

/* Whose work waits, beside the calling thread's? */
static void count_threads(void) {
  pthread_t givers[MOST_STREAMS] = {pthread_self()};
  int count = 1;
  for (int i = 0; i < most_streams; ++i) {
    for (const struct op* op = streams[i].first; op != NULL && count < MOST_STREAMS;
         op = op->next) {
      int known = op->kind != KERNEL && op->kind != COPY;
      for (int t = 0; t < count; ++t) known |= pthread_equal(givers[t], op->giver);
      if (!known) givers[count++] = op->giver;
    }
  }
  if (count > most_threads) most_threads = count;
}

int give(CUstream handle, struct op op) {
  struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  if (current == NULL && handle == NULL) fault("the default stream is used without a context");
  int error = broken[stream->device];
  if (error == 0 && handle == NULL && current == NULL) error = CUDA_ERROR_INVALID_CONTEXT;
  if (error == 0 && handle != NULL && !stream->alive) {
    fault("a stream is used that is gone");
    error = CUDA_ERROR_INVALID_VALUE;
  }
  if (error == 0 && spoils_by_default_stream(stream)) error = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  if (error == 0 && stream->recorded != NULL) {
    struct sim_graph* graph = stream->recorded;
    if ((op.kind == KERNEL || op.kind == COPY) && graph->count < MOST_OPS) {
      graph->ops[graph->count++] = op;
    } else if (op.kind != RECORD) { /* of waits, since the event was not captured */
      graph->invalid = 1;
      error = op.kind == WAIT ? CUDA_ERROR_STREAM_CAPTURE_ISOLATION
                              : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
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
