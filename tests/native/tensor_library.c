/* Tensors as the lanes know them: counted, and of those that have memory also what torch's shim does with them. */
#define _GNU_SOURCE
#include "model_library.h"
#include "simulated_cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DIMS = 4, MOST_INPUTS = 64 };

struct storage {
  int owners; /* guarded by the mutex */
  int32_t device_type;
  size_t bytes;
  unsigned char* data;
};

struct tensor {
  struct tensor* self; /* so that a handle is, as torch's are, the address of a pointer to what is meant */
  int deletes;
  int broken;
  struct storage* storage; /* null: a tensor without memory, only to be counted */
  int32_t dtype;
  int64_t dims;
  int64_t offset;
  int64_t sizes[MOST_DIMS];
  int64_t strides[MOST_DIMS];
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int live;
static int live_memory;
static _Thread_local CUstream current_stream;
static _Thread_local void* given[MOST_INPUTS]; /* to the thread's last run; null: freed since */
static int calls_until_refusal; /* 0: none is refused */

static void must(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "not so: %s\n", what);
  abort();
}

static struct tensor* at(void* handle) { return *(struct tensor**)handle; }

static struct tensor* make(void) {
  struct tensor* tensor = calloc(1, sizeof *tensor);
  tensor->self = tensor;
  pthread_mutex_lock(&mutex);
  ++live;
  pthread_mutex_unlock(&mutex);
  return tensor;
}

/* --- counted ---------------------------------------------------------------------------------------------------- */

void* new_tensor(void) { return make(); }

void note_inputs(void** inputs, size_t num_inputs) {
  must(num_inputs <= MOST_INPUTS, "a run has few inputs");
  memset(given, 0, sizeof given);
  for (size_t i = 0; i < num_inputs; ++i) given[i] = inputs[i];
}

int inputs_left(void) {
  int left = 0;
  for (size_t i = 0; i < MOST_INPUTS; ++i) left += given[i] != NULL;
  return left;
}

int32_t torch_delete_tensor(void* handle) {
  struct tensor* tensor = handle;
  for (size_t i = 0; i < MOST_INPUTS; ++i) {
    if (given[i] == handle) given[i] = NULL;
  }
  pthread_mutex_lock(&mutex);
  ++tensor->deletes;
  --live;
  struct storage* storage = tensor->storage;
  const int last = storage != NULL && --storage->owners == 0;
  live_memory -= last;
  pthread_mutex_unlock(&mutex);
  if (last && storage->device_type == ON_DEVICE) sim_free(storage->data);
#ifdef FREE_TENSORS
  if (last && storage->device_type == ON_HOST) free(storage->data);
  if (last) free(storage);
  free(tensor);
#endif
  return 0;
}

int tensor_deletes(void* handle) {
  pthread_mutex_lock(&mutex);
  const int deletes = ((struct tensor*)handle)->deletes;
  pthread_mutex_unlock(&mutex);
  return deletes;
}

int32_t torch_new_tensor_handle(void** tensor, void** made) {
  if (((struct tensor*)*tensor)->broken) return 1;
  pthread_mutex_lock(&mutex);
  ++live;
  pthread_mutex_unlock(&mutex);
  *made = *tensor;
  return 0;
}

void break_tensor(void* handle) { ((struct tensor*)handle)->broken = 1; }

void* torch_wrap_nothing(void* handle) {
  (void)handle;
  return NULL;
}

void* torch_wrap_throws(void* handle) {
  (void)handle;
  throw_standard("torch is out of memory");
  return NULL;
}

int live_tensors(void) {
  pthread_mutex_lock(&mutex);
  const int now = live;
  pthread_mutex_unlock(&mutex);
  return now;
}

int live_storages(void) {
  pthread_mutex_lock(&mutex);
  const int now = live_memory;
  pthread_mutex_unlock(&mutex);
  return now;
}

/* --- with memory ------------------------------------------------------------------------------------------------ */

void refuse_torch_call(int which) {
  pthread_mutex_lock(&mutex);
  calls_until_refusal = which;
  pthread_mutex_unlock(&mutex);
}

static int refused(void) {
  pthread_mutex_lock(&mutex);
  const int is = calls_until_refusal > 0 && --calls_until_refusal == 0;
  pthread_mutex_unlock(&mutex);
  if (is) set_root_cause("torch refused");
  return is;
}

static unsigned char* data_of(const struct tensor* tensor) {
  return tensor->storage == NULL ? NULL : tensor->storage->data + tensor->offset * tensor->dtype;
}

int32_t torch_get_data_ptr(void* handle, void** data) {
  *data = data_of(at(handle));
  return refused();
}

int32_t torch_get_dim(void* handle, int64_t* dims) {
  *dims = at(handle)->dims;
  return refused();
}

int32_t torch_get_sizes(void* handle, int64_t** sizes) {
  *sizes = at(handle)->sizes;
  return refused();
}

int32_t torch_get_strides(void* handle, int64_t** strides) {
  *strides = at(handle)->strides;
  return refused();
}

int32_t torch_get_dtype(void* handle, int32_t* dtype) {
  *dtype = at(handle)->dtype;
  return refused();
}

size_t torch_dtype_element_size(int32_t dtype) { return (size_t)dtype; }

static void shape(struct tensor* tensor, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t last = tensor->offset;
  int empty = 0;
  must(dims <= MOST_DIMS, "a tensor has few dimensions");
  tensor->dims = dims;
  for (int64_t i = 0; i < dims; ++i) {
    must(sizes[i] >= 0, "a size is a number of things");
    tensor->sizes[i] = sizes[i];
    tensor->strides[i] = strides[i];
    empty = empty || sizes[i] == 0;
    last += (sizes[i] - 1) * strides[i];
  }
  must(empty || (size_t)(last + 1) * (size_t)tensor->dtype <= tensor->storage->bytes, "a tensor lies in its memory");
}

int32_t torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                            int32_t device_type, int32_t device_index, void** made) {
  (void)device_index;
  if (refused()) return 1;
  int64_t elements = 1;
  for (int64_t i = 0; i < dims; ++i) elements *= sizes[i];
  const size_t bytes = (size_t)elements * (size_t)dtype;
  void* data = device_type == ON_DEVICE ? sim_allocate(bytes, current_stream) : malloc(bytes + 1);
  if (data == NULL) return 1; /* a broken device, or a full one */
  struct tensor* tensor = make();
  tensor->storage = malloc(sizeof *tensor->storage);
  tensor->storage->owners = 1;
  tensor->storage->bytes = bytes;
  tensor->storage->device_type = device_type;
  tensor->storage->data = data;
  if (device_type == ON_HOST) memset(tensor->storage->data, 0xab, bytes);
  tensor->dtype = dtype;
  shape(tensor, dims, sizes, strides);
  pthread_mutex_lock(&mutex);
  ++live_memory;
  pthread_mutex_unlock(&mutex);
  *made = tensor;
  return 0;
}

int32_t torch_reinterpret_tensor(void* handle, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset,
                                 void** made) {
  if (refused()) return 1;
  const struct tensor* whole = at(handle);
  struct tensor* tensor = make();
  tensor->storage = whole->storage;
  tensor->dtype = whole->dtype;
  tensor->offset = whole->offset + offset;
  pthread_mutex_lock(&mutex);
  ++tensor->storage->owners;
  pthread_mutex_unlock(&mutex);
  shape(tensor, dims, sizes, strides);
  *made = tensor;
  return 0;
}

static void* copy(const struct tensor* matrix, int64_t rows) {
  const int64_t sizes[] = {rows, matrix->sizes[1]};
  const int64_t strides[] = {matrix->sizes[1], 1};
  void* made = NULL;
  must(matrix->dims == 2, "what is copied is a matrix");
  if (torch_empty_strided(2, sizes, strides, matrix->dtype, 0, 0, &made)) return NULL;
  const size_t element = (size_t)matrix->dtype;
  for (int64_t i = 0; i < rows && i < matrix->sizes[0]; ++i) {
    for (int64_t j = 0; j < matrix->sizes[1]; ++j) {
      memcpy(data_of(made) + (i * strides[0] + j) * matrix->dtype,
             data_of(matrix) + (i * matrix->strides[0] + j * matrix->strides[1]) * matrix->dtype, element);
    }
  }
  return made;
}

int32_t torch_clone(void* handle, void** made) {
  *made = copy(at(handle), at(handle)->sizes[0]);
  return *made == NULL;
}

void* new_matrix(int64_t rows, int64_t columns, int32_t dtype, int value) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns, 1};
  void* made = NULL;
  if (torch_empty_strided(2, sizes, strides, dtype, 0, 0, &made)) return NULL;
  memset(data_of(made), value, ((struct tensor*)made)->storage->bytes);
  return made;
}

void* view_of_matrix(void* handle) {
  const struct tensor* matrix = at(handle);
  void* made = NULL;
  return torch_reinterpret_tensor(handle, matrix->dims, matrix->sizes, matrix->strides, 0, &made) ? NULL : made;
}

void* next_matrix(void* handle, int64_t more_rows) {
  const int64_t rows = at(handle)->sizes[0] + more_rows;
  struct tensor* made = copy(at(handle), rows < 0 ? 0 : rows);
  if (made == NULL) return NULL;
  for (size_t i = 0; i < made->storage->bytes; ++i) ++made->storage->data[i];
  return made;
}

/* --- on the device ----------------------------------------------------------------------------------------------- */

int32_t torch_get_device_type(void* handle, int32_t* type) {
  const struct storage* storage = at(handle)->storage;
  *type = storage == NULL ? ON_HOST : storage->device_type;
  return refused();
}

void torch_record_use(void* handle, struct torch_stream stream) {
  const struct tensor* tensor = at(handle);
  if (stream.device_type != ON_DEVICE || tensor->storage->device_type != ON_DEVICE) {
    sim_fault("a use is recorded of what is not on the device");
    return;
  }
  if (tensor->storage->data != NULL) sim_record_use(tensor->storage->data, (CUstream)stream.id);
}

int32_t torch_new_handle_of(void* handle, void** made) {
  *made = view_of_matrix(handle);
  return *made == NULL;
}

int32_t torch_another_handle(void* handle, void** made) {
  const struct tensor* tensor = at(handle);
  if (refused() || tensor->broken) return 1;
  struct tensor* another = make();
  another->storage = tensor->storage;
  another->dtype = tensor->dtype;
  another->offset = tensor->offset;
  another->dims = tensor->dims;
  memcpy(another->sizes, tensor->sizes, sizeof another->sizes);
  memcpy(another->strides, tensor->strides, sizeof another->strides);
  if (another->storage != NULL) {
    pthread_mutex_lock(&mutex);
    ++another->storage->owners;
    pthread_mutex_unlock(&mutex);
  }
  *made = another;
  return 0;
}

int32_t torch_copy(void* to, void* from, int32_t non_blocking) {
  (void)to, (void)from, (void)non_blocking;
  return 1; /* the driver copies */
}

int32_t torch_guard_stream(void* stream, int32_t index, void** made) {
  (void)index;
  if (refused()) return 1;
  CUstream* before = malloc(sizeof(CUstream));
  *before = current_stream;
  current_stream = stream;
  *made = before;
  return 0;
}

int32_t torch_unguard_stream(void* guard) {
  current_stream = *(CUstream*)guard;
  free(guard);
  return 0;
}

struct addition {
  const unsigned char* from;
  unsigned char* to;
  size_t bytes;
};

static void add_one(void* argument) {
  const struct addition* addition = argument;
  for (size_t i = 0; i < addition->bytes; ++i) addition->to[i] = (unsigned char)(addition->from[i] + 1);
}

int32_t device_model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs, size_t num_outputs,
                         void* stream, void* proxy_executor) {
  int32_t error = container->status;
  void* guard = NULL;
  (void)proxy_executor;
  if (torch_guard_stream(stream, 0, &guard)) return 1;
  for (size_t i = 0; i < num_outputs && num_inputs > 0; ++i) {
    const struct tensor* input = at(inputs[i % num_inputs]);
    must(input->storage->device_type == ON_DEVICE, "an input is on the device");
    if (!(container->made >> i & 1)) continue;
    if (torch_empty_strided(input->dims, input->sizes, input->strides, input->dtype, ON_DEVICE, 0, &outputs[i])) {
      error = 1;
      break;
    }
    struct addition* addition = malloc(sizeof *addition);
    *addition = (struct addition){data_of(input), data_of(outputs[i]), at(outputs[i])->storage->bytes};
    const struct sim_kernel kernel = {
        add_one, free, addition, 2, {{addition->to, addition->bytes, 1}, {addition->from, addition->bytes, 0}}};
    const int launched = sim_launch(stream, &kernel);
    if (launched != 0) error = launched;
  }
  for (size_t i = 1; i < num_outputs; ++i) {
    if (container->again >> i & 1) outputs[i] = outputs[0];
  }
  for (size_t i = 0; i < num_inputs; ++i) {
    torch_delete_tensor(inputs[i]);
    inputs[i] = NULL;
  }
  torch_unguard_stream(guard);
  return error;
}

int is_matrix_of(void* handle, int64_t rows, int64_t columns, int value) {
  const struct tensor* matrix = at(handle);
  if (matrix->dims != 2 || matrix->sizes[0] != rows || matrix->sizes[1] != columns) return 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns * matrix->dtype; ++j) {
      if (matrix->strides[1] != 1 || data_of(matrix)[i * matrix->strides[0] * matrix->dtype + j] != value) return 0;
    }
  }
  return 1;
}
