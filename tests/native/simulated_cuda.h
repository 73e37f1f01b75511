/* A simulated CUDA device: the part of the driver's API that the lanes use, over a thread that is the device, an allocator
 * like torch's, and checks of what on a real device would only sometimes go wrong.
 *
 * Work on a stream is done in its order by the device thread, at once, when the test says so (hold, step), or after a time.
 * What breaks a rule is counted, and the first of it told in words:
 *  - device memory is used that is not there, or was given back while another stream still had to use it;
 *  - two streams touch the same memory, one of them writing, and no event or synchronization orders them;
 *  - a stream is used without a context, or a copy that should be asynchronous starts from memory that is not pinned;
 *  - a graph is launched that is gone, or whose memory was given back; or what can't be recorded is done while one is recorded;
 *  - the runtime is called without the device's context, or frees memory of a lost device.
 *
 * While a stream is captured, what may be unsafe is refused as the driver's documentation of cuThreadExchangeStreamCaptureMode
 * says, and spoils the capture. So does every use of the default stream while a stream is captured that it waits for, and every
 * question for an event that was captured; a stream that waits for such an event is captured from then on (CUDA C++ Programming
 * Guide, "Prohibited and Unhandled Operations"; cuda.h, cuStreamIsCapturing). A lost device stays lost until sim_repair, and the other one works on. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
  CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
  CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
  CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
  CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
  CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  CUDA_ERROR_CAPTURED_EVENT = 907,
  CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
  CUDA_ERROR_UNKNOWN = 999,
};

/* The driver's own, by its own names. */
typedef struct sim_context* CUcontext;
typedef struct sim_stream* CUstream;
typedef struct sim_event* CUevent;
typedef struct sim_graph* CUgraph;
typedef struct sim_graph* CUgraphExec;
typedef uint64_t CUdeviceptr;
int cuInit(unsigned flags);
int cuDeviceGetCount(int* count);
int cuDeviceGet(int* device, int ordinal);
int cuDeviceGetName(char* name, int bytes, int device);
int cuDevicePrimaryCtxRetain(CUcontext* context, int device);
int cuDevicePrimaryCtxRelease_v2(int device);
int cuCtxGetCurrent(CUcontext* context);
int cuCtxSetCurrent(CUcontext context);
int cuStreamCreate(CUstream* stream, unsigned flags);
int cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority);
int cuStreamDestroy_v2(CUstream stream);
int cuStreamSynchronize(CUstream stream);
int cuStreamQuery(CUstream stream);
int cuStreamIsCapturing(CUstream stream, int* status);
int cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags);
int cuEventCreate(CUevent* event, unsigned flags);
int cuEventDestroy_v2(CUevent event);
int cuEventRecord(CUevent event, CUstream stream);
int cuEventQuery(CUevent event);
int cuEventSynchronize(CUevent event);
int cuMemAllocHost_v2(void** made, size_t bytes);
int cuMemFreeHost(void* memory);
int cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream);
int cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream);
int cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream);
int cuCtxSynchronize(void);
int cuThreadExchangeStreamCaptureMode(int* mode);
int cuStreamBeginCapture_v2(CUstream stream, int mode);
int cuStreamEndCapture(CUstream stream, CUgraph* graph);
int cuGraphInstantiateWithFlags(CUgraphExec* made, CUgraph graph, unsigned long long flags);
int cuGraphDestroy(CUgraph graph);
int cuGraphExecDestroy(CUgraphExec graph);
int cuGraphLaunch(CUgraphExec graph, CUstream stream);
int cuGetErrorName(int error, const char** words);
int cuGetErrorString(int error, const char** words);

/* A kernel: the device calls `run` with `argument`, and `done` with it afterwards, whatever becomes of the device. */
struct sim_range {
  const void* start;
  size_t bytes;
  int written;
};
struct sim_kernel {
  void (*run)(void* argument);
  void (*done)(void* argument);
  void* argument;
  int ranges;
  struct sim_range range[4];
};
int sim_launch(CUstream stream, const struct sim_kernel* kernel);

int sim_is_recording(CUstream stream);
void sim_fault(const char* what); /* a rule was broken */

/* Device memory as torch's caching allocator gives it: what is given back is given again to the same stream at once, without
 * waiting, and to no other. Another stream's use must be recorded before. Null when the device has no more. */
void* sim_allocate(size_t bytes, CUstream stream);
void sim_free(void* memory);
void sim_record_use(void* memory, CUstream stream);
void sim_empty_cache(void);
size_t sim_allocated(void);    /* bytes in use */
size_t sim_reserved(void);     /* bytes in use or kept */
/* As torch's pools for graphs: what is allocated on the stream comes from the pool until the end, and the pool's memory is
 * given back to the device when it was released as often as it was begun. Each returns 0 where torch raises. */
int sim_begin_pool(CUstream stream, int pool);
int sim_end_pool(int pool);
int sim_release_pool(int pool);
int sim_diverted(void); /* streams whose memory comes from a pool now; no use of a block by two streams ends meanwhile */

/* Device memory of cudaMalloc, which torch's allocator knows nothing of and makes no room for. Null, and the thread's last error,
 * when the device has no more. */
void* sim_malloc(size_t bytes, int device);
int sim_mfree(void* memory, int device);
int sim_device_of(const void* memory);
void sim_runtime_call(int device); /* what a call of CUDA's runtime needs of the calling thread */
int cudaGetLastError(void);        /* the thread's, which it forgets with that */
size_t sim_kept(CUstream stream); /* bytes that it may be given, in use or not */
void sim_memory_limit(size_t bytes); /* 0: none */

/* The test's hand on the device. */
void sim_hold(void);             /* nothing is done any more, but by sim_step */
void sim_go(void);               /* everything is done as it comes */
void sim_take(int microseconds); /* each piece of work takes so long */
int sim_step(void);              /* one piece of work is done; 0 when none can be */
int sim_pending(CUstream stream);
int sim_wait_until_pending(int count); /* on all streams; 0 after a minute in vain */
int sim_waiting(void);           /* threads that wait for a stream now */
int sim_wait_until_waiting(int count);
void sim_refuse_waits(int count, int error); /* so many waits for streams with work, and queries of them, fail at once */
int sim_refused_waits(void);     /* that are still to fail */
int sim_spinning(void);          /* waits so far that kept a core busy */
int sim_refusals(void);          /* calls so far that a capture of another thread, or the thread's own, did not allow */
void sim_break(int error, int device); /* the next kernel breaks the device: from then on every call fails so */
void sim_repair(void);           /* a device like new, and all counts at zero; nothing may be pending */
int sim_faults(const char** first);
CUstream sim_stream(int number);
CUstream sim_blocking_stream(void); /* a user's, that the default stream and it wait for each other */
int sim_most_streams(void);
int sim_priority(CUstream stream);
int sim_streams(void);           /* that are there now, beside the default one */
int sim_events(void);
int sim_pinned(void);
int sim_pinned_ever(void);       /* how often such memory was made */
int sim_graphs(void);            /* that are there now */
int sim_kernels(void);           /* that were run */
int sim_most_threads(void);      /* whose kernels and copies were waiting at once, on all streams */

#ifdef __cplusplus
}
#endif
