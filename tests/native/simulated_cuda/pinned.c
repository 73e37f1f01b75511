/* Pinned memory, and the copies that start or end there. */
#include "state.h"

#include <stdlib.h>

static int is_pinned(const void* address, size_t bytes) {
  for (int i = 0; i < MOST_PINNED; ++i) {
    const char* start = pinned[i].start;
    if (start != NULL && (char*)address >= start &&
        (char*)address + bytes <= start + pinned[i].bytes)
      return 1;
  }
  return 0;
}

int cuMemAllocHost_v2(void** made, size_t bytes) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  pthread_mutex_lock(&mutex);
  int error = broken[device_now()];
  if (error == 0 && is_forbidden()) error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *made = error == 0 ? malloc(bytes) : NULL;
  if (error == 0 && *made == NULL) error = CUDA_ERROR_OUT_OF_MEMORY;
  for (int i = 0; i < MOST_PINNED && error == 0; ++i) {
    if (pinned[i].start != NULL) continue;
    pinned[i].start = *made;
    pinned[i].bytes = bytes;
    pinned[i].device = device_now();
    ++pinned_ever;
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
          if (overlap(&all, &op->kernel.range[k]) && !broken[streams[j].device])
            fault("pinned memory is freed that a copy still uses");
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
  struct op op = {.kind = COPY,
                  .kernel = {.ranges = 2, .range = {{to, bytes, 1}, {from, bytes, 0}}}};
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
