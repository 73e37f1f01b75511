#define _GNU_SOURCE
#include "model_library.h"

#include <pthread.h>
#include <time.h>

enum { MOST_CALLS = 65536 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards everything below, and the containers' records */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int begun;
static int calls;
static struct {
  char name[16];
  char function;
  int count;
} called[MOST_CALLS];

/* The words of a failure belong to the thread that failed: any other finds none. */
static _Thread_local const char* last_error;
static _Thread_local const char* root_cause;
static _Thread_local int omp_count = 4;
static _Thread_local int mkl_count = 0;

static struct timespec in_a_minute(void) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 60;
  return until;
}

/* --- runs ----------------------------------------------------------------------------------------------------- */

static int enter(struct container* container, size_t num_inputs, size_t num_outputs, void* stream, void* proxy) {
  int waited_in_vain = 0;
  const struct timespec until = in_a_minute();
  pthread_mutex_lock(&mutex);
  ++container->runs;
  if (++container->inside > container->most_inside) container->most_inside = container->inside;
  container->began = ++begun;
  container->omp_threads = omp_count;
  container->mkl_threads = mkl_count;
  container->num_inputs = num_inputs;
  container->num_outputs = num_outputs;
  container->stream = stream;
  container->proxy_executor = proxy;
  pthread_cond_broadcast(&changed);
  while (container->gated && !waited_in_vain) waited_in_vain = pthread_cond_timedwait(&changed, &mutex, &until);
  pthread_mutex_unlock(&mutex);
  return waited_in_vain;
}

static int32_t leave(struct container* container, int waited_in_vain) {
  pthread_mutex_lock(&mutex);
  --container->inside;
  pthread_mutex_unlock(&mutex);
  last_error = waited_in_vain ? "nobody opened the gate" : container->error;
  root_cause = container->cause;
  if (container->throws == THROWS_STANDARD) throw_standard(container->error);
  if (container->throws == THROWS_OTHER) throw_other();
  return waited_in_vain ? -2 : container->status;
}

static void repeat(const struct container* container, void** outputs, size_t num_outputs) {
  for (size_t i = 1; i < num_outputs; ++i) {
    if (container->again >> i & 1) outputs[i] = outputs[0];
  }
}

int32_t model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs, size_t num_outputs,
                  void* stream, void* proxy_executor) {
  note_inputs(inputs, num_inputs);
  const int waited_in_vain = enter(container, num_inputs, num_outputs, stream, proxy_executor);
  if (container->probe != NULL) container->probed = container->probe();
  for (size_t i = 0; i < num_inputs; ++i) {
    if (!(container->stolen >> i & 1)) continue;
    if (container->passes_on && i < num_outputs) {
      outputs[i] = inputs[i];
    } else {
      torch_delete_tensor(inputs[i]);
    }
    inputs[i] = NULL;
  }
  for (size_t i = 0; i < num_outputs; ++i) {
    if (container->made >> i & 1) outputs[i] = new_tensor();
  }
  repeat(container, outputs, num_outputs);
  return leave(container, waited_in_vain);
}

int32_t row_model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs, size_t num_outputs,
                      void* stream, void* proxy_executor) {
  note_inputs(inputs, num_inputs);
  const int waited_in_vain = enter(container, num_inputs, num_outputs, stream, proxy_executor);
  for (size_t i = 0; i < num_outputs; ++i) {
    if (!(container->made >> i & 1)) continue;
    void* const input = inputs[i % num_inputs];
    outputs[i] = container->passes_on ? view_of_matrix(input) : next_matrix(input, container->more_rows);
  }
  repeat(container, outputs, num_outputs);
  for (size_t i = 0; i < num_inputs; ++i) {
    if (!(container->stolen >> i & 1)) continue;
    torch_delete_tensor(inputs[i]);
    inputs[i] = NULL;
  }
  return leave(container, waited_in_vain);
}

int32_t other_model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs,
                        size_t num_outputs, void* stream, void* proxy_executor) {
  (void)container, (void)inputs, (void)num_inputs, (void)outputs, (void)num_outputs, (void)stream;
  (void)proxy_executor;
  return 0;
}

int32_t model_last_error(const char** text) {
  *text = last_error;
  return 0;
}

const char* torch_root_cause(void) { return root_cause; }
void set_root_cause(const char* words) { root_cause = words; }

int32_t device_fence(struct fence* fence) {
  pthread_mutex_lock(&mutex);
  ++fence->calls;
  pthread_mutex_unlock(&mutex);
  if (fence->throws) throw_standard("the device is lost");
  return fence->status;
}

int wait_until_inside(struct container* container, int runs) {
  int waited_in_vain = 0;
  const struct timespec until = in_a_minute();
  pthread_mutex_lock(&mutex);
  while (container->inside < runs && !waited_in_vain) {
    waited_in_vain = pthread_cond_timedwait(&changed, &mutex, &until);
  }
  pthread_mutex_unlock(&mutex);
  return !waited_in_vain;
}

void open_gate(struct container* container) {
  pthread_mutex_lock(&mutex);
  container->gated = 0;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&mutex);
}

/* --- thread counts -------------------------------------------------------------------------------------------- */

static void record(char function, int count) {
  pthread_mutex_lock(&mutex);
  if (calls < MOST_CALLS) {
    pthread_getname_np(pthread_self(), called[calls].name, sizeof called[calls].name);
    called[calls].function = function;
    called[calls].count = count;
    ++calls;
  }
  pthread_mutex_unlock(&mutex);
}

int torch_get_threads(void) {
  record('g', omp_count);
  return omp_count;
}

void torch_set_omp_threads(int count) {
  record('o', count);
  omp_count = count;
}

int torch_set_mkl_threads(int count) {
  const int before = mkl_count;
  record('m', count);
  mkl_count = count;
  return before;
}

void name_thread(const char* name) { pthread_setname_np(pthread_self(), name); }
int omp_threads(void) { return omp_count; }
int mkl_threads(void) { return mkl_count; }

int thread_calls(void) {
  pthread_mutex_lock(&mutex);
  const int now = calls;
  pthread_mutex_unlock(&mutex);
  return now;
}

int thread_call(int n, char name[16], char* function) {
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < 16; ++i) name[i] = called[n].name[i];
  *function = called[n].function;
  const int count = called[n].count;
  pthread_mutex_unlock(&mutex);
  return count;
}
