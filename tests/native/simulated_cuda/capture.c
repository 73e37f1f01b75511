/* Recordings, what they forbid, and the graphs that come of them. */
#include "state.h"

#include <stdlib.h>

/* Which captures forbid the calling thread what may be unsafe while they go on? They are spoilt by
 * it. See the driver's documentation of cuThreadExchangeStreamCaptureMode. */
int is_forbidden(void) {
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

/* Is this a default stream, and unusable since a stream is captured that it waits for? The captures
 * are spoilt by its use. */
int spoils_by_default_stream(const struct sim_stream* stream) {
  int found = 0;
  for (int i = DEVICES; stream->index < DEVICES && i < most_streams; ++i) {
    if (streams[i].recorded == NULL || !streams[i].blocking) continue;
    if (streams[i].device == stream->device) streams[i].recorded->invalid = found = 1;
  }
  return found;
}

static struct sim_graph* capture_of(const struct sim_event* event) {
  for (int i = 0; event->capture != 0 && i < most_streams; ++i) {
    struct sim_graph* recorded = streams[i].recorded;
    if (recorded != NULL && recorded->capture == event->capture) return recorded;
  }
  return NULL;
}

/* May the event not be asked for or waited for by the host, since it was captured? */
int spoils_by_event(const struct sim_event* event) {
  struct sim_graph* capture = capture_of(event);
  if (capture != NULL) capture->invalid = 1;
  return event->capture != 0;
}

/* What becomes of a stream that waits for a captured event: it is captured, too. */
int waits_for_captured(struct sim_stream* stream, const struct sim_event* event) {
  struct sim_graph* capture = capture_of(event);
  if (capture == NULL) return CUDA_ERROR_CAPTURED_EVENT;
  if (stream->index < DEVICES) {
    capture->invalid = 1;
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  if (stream->recorded != NULL && stream->recorded != capture) {
    stream->recorded->invalid = capture->invalid = 1;
    return CUDA_ERROR_STREAM_CAPTURE_MERGE;
  }
  stream->recorded = capture;
  return CUDA_SUCCESS;
}

/* This alone may be asked while streams are captured, and spoils nothing. */
int cuStreamIsCapturing(CUstream handle, int* status) {
  pthread_mutex_lock(&mutex);
  const struct sim_stream* stream = at(handle);
  int error = broken[stream->device];
  for (int i = DEVICES; stream->index < DEVICES && i < most_streams && error == 0; ++i) {
    const struct sim_stream* other = &streams[i];
    if (other->recorded != NULL && other->blocking && other->device == stream->device)
      error = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  *status = stream->recorded == NULL ? 0 : 1 + stream->recorded->invalid;
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return CUDA_SUCCESS;
}

int cuStreamBeginCapture_v2(CUstream handle, int mode) {
  static uint64_t captures;
  pthread_mutex_lock(&mutex);
  struct sim_stream* stream = at(handle);
  int error = broken[stream->device];
  if (stream->recorded != NULL || handle == NULL)
    fault("a stream is recorded twice, or it is the default one");
  if (mode == 1 && diverted == 0) fault("a run is recorded whose memory is of no pool");
  if (error == 0) {
    stream->recorded = calloc(1, sizeof *stream->recorded);
    stream->recorded->capture = ++captures;
    stream->recorded->origin = stream;
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
  } else if (graph->origin != stream) { /* it goes on */
    graph = NULL;
    error = CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  } else if (graph->mode != 2 && !pthread_equal(graph->recorder, pthread_self())) {
    graph = NULL;
    error = CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  } else {
    stream->recorded = NULL;
    /* A stream that was captured in passing would have to be joined before; here it can't be. */
    for (int i = 0; i < most_streams; ++i) {
      if (streams[i].recorded != graph) continue;
      streams[i].recorded = NULL;
      if (error == 0) error = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    }
    if (error == 0 && graph->invalid) error = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (error == 0) {
      graph->next = graphs;
      graphs = *made = graph;
    }
  }
  pthread_mutex_unlock(&mutex);
  if (error != 0 && graph != NULL) forget_ops(graph);
  return error;
}

int sim_is_recording(CUstream handle) {
  pthread_mutex_lock(&mutex);
  const int is = at(handle)->recorded != NULL;
  pthread_mutex_unlock(&mutex);
  return is;
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
        if (op->kind == KERNEL && op->kernel.argument == graph->ops[k].kernel.argument)
          fault("a graph is forgotten that runs");
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
  for (const struct sim_graph* one = graphs; one != NULL; one = one->next)
    found |= one == graph && one->executable;
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
