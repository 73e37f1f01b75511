/* A model without content. Torch's own runner loads it in place of a model, makes the proxy executor of the files beside it, and
 * gives the executor to the model's run, which remembers it. So the executor is had through torch's public interface alone: its class is
 * not exported, and nothing here depends on its layout.
 *
 * This is a library of its own, for torch's loader and for ctypes. Python must not import it: the names are those of every
 * model, and a module may be imported so that its names stand for those of other libraries. */
#include <stddef.h>
#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

static _Thread_local void* given;

/* What the last run of the calling thread was given; null if there was none since the last call. */
EXPORTED void* aoti_sched_given_proxy_executor(void) {
  void* const last = given;
  given = NULL;
  return last;
}

EXPORTED int32_t AOTInductorModelContainerCreateWithDevice(void** made, size_t instances, const char* device,
                                                           const char* resources) {
  static int container;
  (void)instances, (void)device, (void)resources;
  *made = &container;
  return 0;
}

EXPORTED int32_t AOTInductorModelContainerDelete(void* container) {
  (void)container;
  return 0;
}

EXPORTED int32_t AOTInductorModelContainerGetNumOutputs(void* container, size_t* count) {
  (void)container;
  *count = 0;
  return 0;
}

EXPORTED int32_t AOTInductorModelContainerRun(void* container, void** inputs, size_t num_inputs, void** outputs,
                                              size_t num_outputs, void* stream, void* proxy_executor) {
  (void)container, (void)inputs, (void)num_inputs, (void)outputs, (void)num_outputs, (void)stream;
  given = proxy_executor;
  return 0;
}

EXPORTED int32_t AOTInductorModelContainerRunSingleThreaded(void* container, void** inputs, size_t num_inputs,
                                                            void** outputs, size_t num_outputs, void* stream,
                                                            void* proxy_executor) {
  return AOTInductorModelContainerRun(container, inputs, num_inputs, outputs, num_outputs, stream, proxy_executor);
}

EXPORTED int32_t AOTInductorGetLastError(const char** text) {
  *text = "this model has no such function";
  return 0;
}

/* The runner looks these up, and does not call them. */
#define MISSING(name)     \
  EXPORTED int32_t name(void) { return 1; }

MISSING(AOTInductorModelContainerExtractConstantsMap)
MISSING(AOTInductorModelContainerFreeInactiveConstantBuffer)
MISSING(AOTInductorModelContainerGetCallSpec)
MISSING(AOTInductorModelContainerGetConstantDtype)
MISSING(AOTInductorModelContainerGetConstantName)
MISSING(AOTInductorModelContainerGetConstantOriginalFQN)
MISSING(AOTInductorModelContainerGetConstantsBlobSize)
MISSING(AOTInductorModelContainerGetNumConstants)
MISSING(AOTInductorModelContainerRunConstantFolding)
MISSING(AOTInductorModelContainerSwapConstantBuffer)
MISSING(AOTInductorModelContainerUpdateConstantBuffer)
MISSING(AOTInductorModelContainerUpdateConstantBufferFromCpu)
MISSING(AOTInductorModelContainerUpdateInactiveConstantBuffer)
MISSING(AOTInductorModelContainerUpdateUserManagedConstantBuffer)
MISSING(AOTInductorModelUpdateConstantsFromBlob)
