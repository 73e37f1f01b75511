/* Events. */
#include "state.h"

#include <stdlib.h>
#include <string.h>

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
  if (spoils_by_event(event)) error = CUDA_ERROR_CAPTURED_EVENT;
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuEventSynchronize(CUevent event) {
  int blocking = 0;
  pthread_mutex_lock(&mutex);
  const int captured = spoils_by_event(event);
  pthread_mutex_unlock(&mutex);
  if (captured) return CUDA_ERROR_CAPTURED_EVENT;
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
  event->capture = stream->recorded == NULL ? 0 : stream->recorded->capture;
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
  if (event->capture != 0) {
    pthread_mutex_lock(&mutex);
    const int joined = waits_for_captured(stream, event);
    pthread_mutex_unlock(&mutex);
    return joined;
  }
  const int error =
      give(handle, (struct op){.kind = WAIT, .wait_stream = event->stream, .wait_seq = event->seq});
  if (error != 0) return error;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < MOST_STREAMS; ++i) {
    if (event->known[i] > stream->known[i]) stream->known[i] = event->known[i];
  }
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}
