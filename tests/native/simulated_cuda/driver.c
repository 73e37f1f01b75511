/* Devices, contexts and the words for errors. */
#include "state.h"

#include <stdio.h>
#include <stdlib.h>

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
    pthread_create(&thread, NULL, run_device, NULL);
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

int cuGetErrorName(int error, const char** words) {
  *words =
      error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}

int cuGetErrorString(int error, const char** words) {
  *words = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
           : error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
               ? "operation not permitted when stream is capturing"
           : error == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
               ? "operation failed due to a previous error during capture"
               : "unknown error";
  return CUDA_SUCCESS;
}
