/* Device memory as torch's caching allocator gives it, with the pools of graphs. */
#include "state.h"

#include <stdlib.h>
#include <string.h>

struct block* block_of(const void* address) {
  for (int i = 0; i < most_blocks; ++i) {
    if (blocks[i].start == NULL) continue;
    if ((char*)address >= blocks[i].start && (char*)address < blocks[i].start + blocks[i].bytes)
      return &blocks[i];
  }
  return NULL;
}

static int is_free_for(const struct block* block, int stream, int pool) {
  if (block->start == NULL || block->raw || block->in_use || block->pool != pool) return 0;
  if (pool == 0 && block->stream != stream) return 0;
  for (int i = 0; i < most_streams; ++i) {
    /* As torch, which gives no such block back while memory comes from a pool. */
    if (block->recorded[i] > 0 && (diverted > 0 || streams[i].done < block->recorded[i])) return 0;
  }
  return 1;
}

/* Gives the device back what torch keeps and no tensor has. What a graph's pool keeps stays while
 * the pool is used. */
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

struct block* new_block(size_t bytes) {
  struct block* made = NULL;
  for (int i = 0; i < most_blocks && made == NULL; ++i)
    made = blocks[i].start == NULL ? &blocks[i] : NULL;
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

size_t rounded_up(size_t bytes) { return (bytes + 511) / 512 * 512 + (bytes == 0) * 512; }

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

void sim_record_use(void* memory, CUstream handle) {
  const struct sim_stream* stream = at(handle);
  pthread_mutex_lock(&mutex);
  struct block* block = block_of(memory);
  if (block == NULL) {
    fault("a use is recorded of no device memory");
  } else {
    block->recorded[stream->index] =
        UINT64_MAX; /* until it is given back: what comes before that counts */
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
        if (overlap(&all, &op->kernel.range[k]))
          fault("memory is given back that stream %d still has to use", i);
      }
    }
  }
  block->in_use = 0;
  allocated -= block->bytes;
  pthread_mutex_unlock(&mutex);
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

size_t sim_kept(CUstream handle) {
  size_t kept = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < most_blocks; ++i) {
    const struct block* block = &blocks[i];
    if (block->start != NULL && !block->raw && block->stream == at(handle)->index)
      kept += block->bytes;
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
