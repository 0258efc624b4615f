// The CUDA runtime: devices, memory, copies and streams. Small copies are made; all else takes no time.
#include "null.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#undef cudaGetDeviceProperties

void release(void* pointer);

static __thread int current = 0;
int current_device(void) { return current; }

// Devices.
API cudaError_t cudaGetDeviceCount(int* n) { *n = device_count(); return *n ? 0 : cudaErrorNoDevice; }
API cudaError_t cudaGetDevice(int* device) { *device = current; return 0; }
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
  current = device;
  return 0;
}
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", device_name());
  device_uuid((unsigned char*)p->uuid.bytes, device);
  p->totalGlobalMem = device_bytes();
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = shared_per_block();
  p->sharedMemPerMultiprocessor = shared_per_multiprocessor();
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->textureAlignment = 512;
  p->multiProcessorCount = multiprocessors();
  p->pciBusID = device + 1;
  p->l2CacheSize = 50 << 20;
  p->maxThreadsPerMultiProcessor = threads_per_multiprocessor();
  p->maxBlocksPerMultiProcessor = 32;
  p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = p->managedMemory = 1;
  p->canMapHostMemory = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3;
  p->memoryBusWidth = 5120;
  return 0;
}
static int attribute(enum cudaDeviceAttr which) {
  switch ((int)which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMultiProcessorCount: return multiprocessors();
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return shared_per_block();
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return shared_per_multiprocessor();
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return threads_per_multiprocessor();
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrCooperativeLaunch: case cudaDevAttrUnifiedAddressing: case cudaDevAttrMemoryPoolsSupported:
      return 1;
    default: return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  return 0;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { *can = a != b; return 0; }
API cudaError_t cudaDeviceGetPCIBusId(char* text, int n, int device) {
  snprintf(text, n, "0000:%02x:00.0", device + 1);
  return 0;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return 0; }
API cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return 0; }
API cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return 0; }
API cudaError_t cudaDeviceSynchronize(void) {
  count(COUNT_device_waits);
  write_log("devsync\n");
  return forbid_in_capture(cudaErrorStreamCaptureUnsupported);
}
API cudaError_t cudaGetLastError(void) { return 0; }
API cudaError_t cudaPeekAtLastError(void) { return 0; }
API const char* cudaGetErrorString(cudaError_t e) {
  switch ((int)e) {
    case 0: return "no error";
    case 2: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return "null cuda error";
  }
}
API const char* cudaGetErrorName(cudaError_t e) { return e == 2 ? "cudaErrorMemoryAllocation" : "cudaError"; }

// Memory.
API cudaError_t cudaMalloc(void** pointer, size_t n) {
  int status = forbid_in_capture(cudaErrorStreamCaptureUnsupported);
  count(COUNT_allocations);
  return status ? status : reserve(pointer, n, current);
}
API cudaError_t cudaMallocAsync(void** pointer, size_t n, cudaStream_t s) { return reserve(pointer, n, current); }
API cudaError_t cudaFree(void* pointer) {
  if (!pointer) return 0;
  count(COUNT_releases);
  release(pointer);
  return 0;
}
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t s) { release(pointer); return 0; }
API cudaError_t cudaHostAlloc(void** pointer, size_t n, unsigned flags) { return reserve(pointer, n, ON_HOST); }
API cudaError_t cudaFreeHost(void* pointer) { release(pointer); return 0; }
API cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) { return reserve(pointer, 1 << 20, current); }
size_t nullcuda_used(int device);
API cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  *total = device_bytes();
  *unused = usable_bytes() - nullcuda_used(current);
  return 0;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* pointer) {
  memset(a, 0, sizeof *a);
  int device = device_of(pointer);
  a->type = device == ON_HOST ? cudaMemoryTypeHost : device >= 0 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = device >= 0 ? device : 0;
  a->devicePointer = device == UNKNOWN ? NULL : (void*)pointer;
  a->hostPointer = device == ON_HOST ? (void*)pointer : NULL;
  return 0;
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) { *pool = new_handle(); return 0; }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr a, void* value) {
  *(uint64_t*)value = 0;
  return 0;
}

// Copies.
static int copy(void* to, const void* from, size_t n, const char* how, cudaStream_t stream) {
  int there = device_of(to), here = device_of(from), captured = is_capturing(stream);
  int to_host = there < 0 && here >= 0, to_device = there >= 0 && here < 0;
  if (captured && (there == UNKNOWN || here == UNKNOWN)) return forbid_on(stream, cudaErrorStreamCaptureUnsupported);
  int status = count_on(to_host ? COUNT_to_host : to_device ? COUNT_to_device : COUNT_on_device, stream);
  write_log("copy %s %s %zu stream %p pinned %d\n", how, to_host ? "D2H" : to_device ? "H2D" : "D2D", n, (void*)stream,
            (to_host ? there : here) == ON_HOST);
  if (captured) return status;
  // A single byte is the answer to a comparison: yes.
  if (n == 1 && to_host) *(char*)to = 1;
  else if (n <= 1 << 20) memmove(to, from, n);
  return 0;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  return copy(to, from, n, "async", s);
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, enum cudaMemcpyKind kind) {
  int status = forbid_in_capture(cudaErrorStreamCaptureImplicit);
  return status ? status : copy(to, from, n, "sync", 0);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int there, const void* from, int here, size_t n, cudaStream_t s) {
  return copy(to, from, n, "peer", s);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, enum cudaMemcpyKind kind, cudaStream_t s) {
  return count_on(COUNT_on_device, s);
}
API cudaError_t cudaMemset(void* pointer, int value, size_t n) { return 0; }
API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t n, cudaStream_t s) {
  write_log("memset %zu stream %p\n", n, (void*)s);
  return count_on(COUNT_launches, s);
}

// Streams; their events are in graphs.c.
API cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = new_handle(); return 0; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { *s = new_handle(); return 0; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
  *s = new_handle();
  write_log("newstream %p priority %d\n", (void*)*s, priority);
  return 0;
}
API cudaError_t cudaStreamDestroy(cudaStream_t s) { return 0; }
API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  count(COUNT_stream_waits);
  write_log("streamsync %p\n", (void*)s);
  int status = forbid_on(s, cudaErrorStreamCaptureUnsupported);
  return status ? status : forbid_in_capture(cudaErrorStreamCaptureUnsupported);
}
API cudaError_t cudaStreamQuery(cudaStream_t s) { return forbid_on(s, cudaErrorStreamCaptureUnsupported); }
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) { *priority = 0; return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                                 unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
  static void* driver = NULL;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : NULL;
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return 0;
}
