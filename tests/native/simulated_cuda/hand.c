/* The test's hand on the device. */
#include "state.h"

#define SET(statement)              \
  pthread_mutex_lock(&mutex);       \
  statement;                        \
  pthread_cond_broadcast(&changed); \
  pthread_mutex_unlock(&mutex)

#define GET(name, expression)     \
  int name(void) {                \
    pthread_mutex_lock(&mutex);   \
    const int now = expression;   \
    pthread_mutex_unlock(&mutex); \
    return now;                   \
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
CUstream sim_blocking_stream(void) {
  CUstream made = NULL;
  open_stream(&made, 1, 0);
  return made;
}
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
GET(sim_pinned_ever, pinned_ever)

static int wait_until(int (*count)(void), int least) {
  const struct timespec until = in_a_minute();
  int waited_in_vain = 0;
  pthread_mutex_lock(&mutex);
  while (count() < least && !waited_in_vain)
    waited_in_vain = pthread_cond_timedwait(&changed, &mutex, &until);
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

/* What a lost device was given before, which it would do once it is repaired. */
static int left_to_lost_devices(void) {
  int left = 0;
  for (int i = 0; i < most_streams; ++i) {
    if (broken[streams[i].device]) left += (int)(streams[i].seq - streams[i].done);
  }
  return left;
}

void sim_repair(void) {
  const struct timespec until = in_a_minute();
  pthread_mutex_lock(&mutex);
  held = microseconds = faults = kernels = most_threads = spinning = refusals = refused_waits = 0;
  limit = 0;
  pthread_cond_broadcast(&changed);
  while (left_to_lost_devices() > 0 && pthread_cond_timedwait(&changed, &mutex, &until) == 0) {
  }
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
