/* Device memory outside torch's allocator, and the other calls of CUDA's runtime. */
#include "state.h"

#include <stdlib.h>

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
    fault("the runtime is called in the context of device %d, not of device %d", current->device,
          device);
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
          if (overlap(&all, &op->kernel.range[k]))
            fault("memory is freed that stream %d still has to use", i);
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
