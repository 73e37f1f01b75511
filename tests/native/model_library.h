/* What a compiled model and torch are to the lanes, scripted: the tests say what each run does, and count.
 *
 * A container is a plain struct that the test fills in, field by field. Nothing here ever frees a tensor's memory
 * (unless FREE_TENSORS is defined), so that freeing one twice is counted and not fatal. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { THROWS_NOTHING, THROWS_STANDARD, THROWS_OTHER };

struct container {
  /* The script. */
  int32_t status;      /* what the run returns */
  int32_t throws;      /* or throws instead */
  const char* error;   /* the runtime's words for it */
  const char* cause;   /* torch's words for it */
  uint64_t stolen;     /* bit i: input i is taken, and its slot nulled */
  uint64_t made;       /* bit i: output i is made; the others stay null */
  uint64_t again;      /* bit i: output i is the handle of output 0 again */
  int32_t passes_on;   /* outputs are the stolen inputs themselves */
  int32_t gated;       /* the run waits for open_gate */
  int (*probe)(void);  /* the run calls this, if it is given */
  int64_t more_rows;   /* of the outputs of row_model_run than its inputs have */
  /* The record. */
  int32_t omp_threads; /* of the last run's thread */
  int32_t mkl_threads;
  int32_t runs;        /* that were begun */
  int32_t inside;      /* that go on now */
  int32_t most_inside; /* that went on at once */
  int32_t began;       /* the last run's place among all runs of the process */
  int32_t probed;      /* what the probe returned */
  uint64_t num_inputs; /* and what it was given */
  uint64_t num_outputs;
  void* stream;
  void* proxy_executor;
};

/* The C ABI of a model. */
int32_t model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs, size_t num_outputs,
                  void* stream, void* proxy_executor);
int32_t model_last_error(const char** text);
/* A run over matrices. Output i is made of input i modulo their number: a view of it (passes_on), or a new matrix whose bytes
 * are greater by one. It may be left out when torch refuses. */
int32_t row_model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs, size_t num_outputs,
                      void* stream, void* proxy_executor);
/* A run over matrices on the device (below): output i is made there of input i modulo their number by a kernel on the stream, which adds
 * one to each byte. It takes the inputs and returns before the device is done, also when it fails (`status`). */
int32_t device_model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs, size_t num_outputs,
                         void* stream, void* proxy_executor);
/* Another model's run, which does nothing and succeeds. */
int32_t other_model_run(struct container* container, void** inputs, size_t num_inputs, void** outputs,
                        size_t num_outputs, void* stream, void* proxy_executor);

/* What lanes need of torch. */
int32_t torch_delete_tensor(void* handle);
const char* torch_root_cause(void);
int torch_get_threads(void);
void torch_set_omp_threads(int count);
int torch_set_mkl_threads(int count);

/* How torch makes a handle of a tensor, and Python's tensor of a handle. It makes no second handle of a broken one. */
int32_t torch_new_tensor_handle(void** tensor, void** made);
void break_tensor(void* handle);
/* As torch's: another tensor of the same memory, of any shape and place. It makes none of a broken one. */
int32_t torch_another_handle(void* handle, void** made);
void* torch_wrap_nothing(void* handle);
void* torch_wrap_throws(void* handle);

/* What batches need of torch. The number of a dtype is the size of its elements. The which-th call from now on is refused, 1
 * being the next; 0 stands for none. */
int32_t torch_get_data_ptr(void* handle, void** data);
int32_t torch_get_dim(void* handle, int64_t* dims);
int32_t torch_get_sizes(void* handle, int64_t** sizes);
int32_t torch_get_strides(void* handle, int64_t** strides);
int32_t torch_get_dtype(void* handle, int32_t* dtype);
size_t torch_dtype_element_size(int32_t dtype);
int32_t torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                            int32_t device_type, int32_t device_index, void** made);
int32_t torch_reinterpret_tensor(void* handle, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset,
                                 void** made);
int32_t torch_clone(void* handle, void** made);
void refuse_torch_call(int which);

/* The simulated device beside the host, by torch's numbers for their kinds. Memory on it is of the thread's current stream. */
enum { ON_HOST = 0, ON_DEVICE = 1 };
int32_t torch_get_device_type(void* handle, int32_t* type);
struct torch_stream {
  int8_t device_type, device_index;
  int64_t id;
};
void torch_record_use(void* handle, struct torch_stream stream);
int32_t torch_new_handle_of(void* handle, void** made); /* a second tensor of the same memory */
int32_t torch_copy(void* to, void* from, int32_t non_blocking);
int32_t torch_guard_stream(void* stream, int32_t index, void** made);
int32_t torch_unguard_stream(void* guard);

/* Matrices, every byte of which has one value. Those that make one give null when torch refuses. */
void* new_matrix(int64_t rows, int64_t columns, int32_t dtype, int value);
void* view_of_matrix(void* handle);
void* next_matrix(void* handle, int64_t more_rows);
int is_matrix_of(void* handle, int64_t rows, int64_t columns, int value);

/* A device's fence: its argument says what it returns, and how often it was called. */
struct fence {
  int32_t status;
  int32_t throws;
  int32_t calls;
};
int32_t device_fence(struct fence* fence);

/* For the tests. Those that wait give up after a minute: then they return 0. */
void* new_tensor(void);
int tensor_deletes(void* handle);
/* How many inputs of the calling thread's last run it has not freed since. Runs note their inputs. */
int inputs_left(void);
void note_inputs(void** inputs, size_t num_inputs);
int live_tensors(void);
int live_storages(void);
void set_root_cause(const char* words); /* of the calling thread */
int wait_until_inside(struct container* container, int runs);
void open_gate(struct container* container);
void name_thread(const char* name);
/* The calling thread's counts now: OpenMP's, and MKL's, which is 0 until it is set. */
int omp_threads(void);
int mkl_threads(void);
/* How often a thread count was asked for or set, and the n-th time: on which thread, by which function ('g', 'o', 'm'),
 * and the count. */
int thread_calls(void);
int thread_call(int n, char name[16], char* function);

/* Of model_throws.cpp: C can't. */
void throw_standard(const char* what);
void throw_other(void);

#ifdef __cplusplus
}
#endif
