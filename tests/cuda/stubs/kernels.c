// Kernels of torch's libraries: looked up, checked, counted, and never run.
#include "null.h"
#include <cuda_runtime_api.h>
#include <pthread.h>

typedef struct {
  const void* host;
  const char* name;
} Kernel;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Kernel* kernels = NULL;
static size_t kernel_count = 0, room = 0, sorted = 0;

API void** __cudaRegisterFatBinary(void* binary) {
  static void* handles[4];
  return handles;
}
API void __cudaRegisterFatBinaryEnd(void** handles) {}
API void __cudaUnregisterFatBinary(void** handles) {}
API void __cudaRegisterFunction(void** handles, const char* host, char* device, const char* name, int limit,
                                void* thread, void* block, void* block_size, void* grid_size, int* warp_size) {
  pthread_mutex_lock(&mutex);
  if (kernel_count == room) kernels = realloc(kernels, (room = room ? 2 * room : 65536) * sizeof(Kernel));
  kernels[kernel_count++] = (Kernel){host, name};
  pthread_mutex_unlock(&mutex);
}
API void __cudaRegisterVar(void** handles, char* host, char* device, const char* name, int external, size_t bytes,
                           int constant, int global) {}
API char __cudaInitModule(void** handles) { return 1; }
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) { *kernel = (cudaKernel_t)host; return 0; }

static int by_host(const void* a, const void* b) {
  const Kernel *x = a, *y = b;
  return x->host < y->host ? -1 : x->host > y->host;
}
static const char* name_of(const void* host) {
  pthread_mutex_lock(&mutex);
  if (sorted != kernel_count) qsort(kernels, sorted = kernel_count, sizeof(Kernel), by_host);
  Kernel wanted = {host, NULL}, *found = bsearch(&wanted, kernels, kernel_count, sizeof(Kernel), by_host);
  const char* name = found ? found->name : "?";
  pthread_mutex_unlock(&mutex);
  return name;
}

typedef struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} Configuration;
static __thread Configuration pushed[16];
static __thread int depth = 0;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed[depth++] = (Configuration){grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration last = pushed[--depth];
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *(void**)stream = last.stream;
  return 0;
}
static cudaError_t launch(const void* host, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  unsigned threads = block.x * block.y * block.z;
  int status = count_on(COUNT_launches, stream);
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024 ||
      shared > (size_t)shared_per_block()) {
    fprintf(stderr, "NULLCUDA invalid launch %s grid %u %u %u threads %u shared %zu\n", name_of(host), grid.x, grid.y,
            grid.z, threads, shared);
    return cudaErrorInvalidConfiguration;
  }
  write_log("launch %s grid %u,%u,%u threads %u shared %zu stream %p\n", name_of(host), grid.x, grid.y, grid.z, threads,
            shared, (void*)stream);
  return status;
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  return launch(f, grid, block, shared, s);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t s) {
  return launch(f, grid, block, shared, s);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared,
                                            cudaStream_t s) {
  return launch(f, grid, block, shared, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** arguments) {
  return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) { f(data); return 0; }
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned flags) {
  f(s, 0, data);
  return 0;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->binaryVersion = a->ptxVersion = capability();
  a->maxDynamicSharedSizeBytes = shared_per_block();
  return 0;
}
API cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute a, int value) {
  if (a != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= shared_per_block()) return 0;
  fprintf(stderr, "NULLCUDA %s wants %d bytes of shared memory\n", name_of(f), value);
  return cudaErrorInvalidValue;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int threads, size_t shared) {
  *n = 2;
  return 0;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int threads,
                                                                       size_t shared, unsigned flags) {
  *n = 2;
  return 0;
}

// Called by the driver's stub.
API int nullcuda_triton_launch(const char* name, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared,
                               void* stream) {
  count_on(COUNT_triton_launches, stream);
  write_log("launch triton %s grid %u,%u,%u threads %u shared %u stream %p\n", name, x, y, z, threads, shared, stream);
  return count_on(COUNT_launches, stream);
}
