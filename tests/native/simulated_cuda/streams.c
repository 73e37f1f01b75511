/* Streams: made, waited for and asked. */
#include "state.h"

int open_stream(CUstream* made, int blocking, int priority) {
  int error = current == NULL ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&mutex);
  for (int i = DEVICES; current != NULL && i < MOST_STREAMS; ++i) {
    if (streams[i].alive || streams[i].first != NULL) continue;
    error = broken[device_now()];
    if (error != 0) break;
    streams[i].alive = 1;
    streams[i].device = device_now();
    streams[i].priority = priority;
    streams[i].blocking = blocking;
    streams[i].born = streams[i].seq;
    if (i >= most_streams) most_streams = i + 1;
    *made = &streams[i];
    break;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

int cuStreamCreateWithPriority(CUstream* made, unsigned flags, int priority) {
  if (flags != 1)
    sim_fault("a stream waits for the default one: it was made without CU_STREAM_NON_BLOCKING");
  return open_stream(made, flags != 1, priority);
}

int cuStreamCreate(CUstream* made, unsigned flags) {
  return cuStreamCreateWithPriority(made, flags, 0);
}

int sim_priority(CUstream stream) { return stream->priority; }

int cuStreamDestroy_v2(CUstream stream) {
  pthread_mutex_lock(&mutex);
  if (stream->first != NULL && !broken[stream->device])
    fault("a stream is destroyed that has work to do");
  stream->alive = 0;
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

/* Waits until the stream has come so far. */
int wait_for(struct sim_stream* stream, uint64_t seq, int* counted) {
  const struct timespec until = in_a_minute();
  int waited_in_vain = 0;
  pthread_mutex_lock(&mutex);
  if (refused_waits > 0) {
    --refused_waits;
    const int refused = refusal;
    pthread_mutex_unlock(&mutex);
    return refused;
  }
  if (spoils_by_default_stream(stream)) {
    pthread_mutex_unlock(&mutex);
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
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
  for (int i = 0; i < MOST_STREAMS && error == CUDA_SUCCESS; ++i)
    error = cuStreamSynchronize(&streams[i]);
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
  if (spoils_by_default_stream(stream)) error = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  if (refused_waits > 0 && stream->index >= DEVICES && stream->seq > stream->born) {
    --refused_waits;
    error = refusal;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}
