// The CUDA driver, libcuda.so.1: what Triton, inductor and our own preflight ask of it.
#include "null.h"
#include <dlfcn.h>

static void* in_runtime(const char* name) { return dlsym(RTLD_DEFAULT, name); }

API int cuInit(unsigned flags) { return device_count() ? 0 : 100; }
API int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
API int cuDeviceGetCount(int* n) { *n = device_count(); return 0; }
API int cuDeviceGet(int* device, int number) { *device = number; return 0; }
API int cuDeviceGetName(char* name, int n, int device) { snprintf(name, n, "%s", device_name()); return 0; }
API int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = device_bytes(); return 0; }
API int cuDeviceGetUuid_v2(unsigned char* uuid, int device) { device_uuid(uuid, device); return 0; }
API int cuDeviceGetUuid(unsigned char* uuid, int device) { device_uuid(uuid, device); return 0; }
static int attribute(int which) {
  switch (which) {
    case 1: return 1024;         // threads per block
    case 8: return 49152;        // shared memory per block
    case 10: return 32;          // warp size
    case 12: case 82: return 65536;  // registers
    case 13: return 1980000;     // clock rate
    case 16: return multiprocessors();
    case 36: return 2619000;     // memory clock rate
    case 37: return 5120;        // bus width
    case 39: return threads_per_multiprocessor();
    case 75: return capability() / 10;
    case 76: return capability() % 10;
    case 81: return shared_per_multiprocessor();
    case 97: return shared_per_block();
    case 102: return 1;          // virtual memory
    default: return 0;
  }
}
API int cuDeviceGetAttribute(int* value, int which, int device) { *value = attribute(which); return 0; }
API int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
API int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)16; return 0; }
API int cuCtxGetCurrent(void** context) { *context = (void*)16; return 0; }
API int cuCtxGetDevice(int* device) { *device = 0; return 0; }
API int cuCtxGetLimit(size_t* value, int limit) { *value = 0; return 0; }
API int cuPointerGetAttribute(void* data, int which, uint64_t pointer) {
  static int (*where)(const void*) = NULL;
  if (!where) where = in_runtime("nullcuda_where");
  *(uint64_t*)data = pointer;
  return where && where((void*)pointer) == UNKNOWN;
}

// Modules and launches.
static int load(void** module) {
  static long modules = 1 << 20;
  *module = (void*)(modules += 16);
  return 0;
}
API int cuModuleLoad(void** module, const char* file) { return load(module); }
API int cuModuleLoadData(void** module, const void* image) { return load(module); }
API int cuModuleLoadDataEx(void** module, const void* image, unsigned n, void* options, void* values) {
  return load(module);
}
API int cuModuleGetFunction(void** function, void* module, const char* name) { *function = strdup(name); return 0; }
API int cuFuncGetAttribute(int* value, int which, void* f) { *value = which == 0 ? 1024 : which == 4 ? 128 : 0; return 0; }
API int cuFuncSetAttribute(void* f, int which, int value) {
  if (which != 8 || value <= shared_per_block()) return 0;
  fprintf(stderr, "NULLCUDA %s wants %d bytes of shared memory\n", (char*)f, value);
  return 1;
}
API int cuOccupancyMaxActiveClusters(int* n, void* f, void* configuration) { *n = 1; return 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void* f, int threads, size_t shared) { *n = 1; return 0; }

static int launch(const char* f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, void* stream) {
  static int (*note)(const char*, unsigned, unsigned, unsigned, unsigned, unsigned, void*) = NULL;
  if (!note) note = in_runtime("nullcuda_triton_launch");
  int status = note ? note(f, x, y, z, threads, shared, stream) : 0;
  if (x && y && z && y <= 65535 && z <= 65535 && (int)shared <= shared_per_block()) return status;
  fprintf(stderr, "NULLCUDA invalid launch %s grid %u %u %u shared %u\n", f, x, y, z, shared);
  return 1;
}
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned n;
} Configuration;
API int cuLaunchKernelEx(const Configuration* c, void* f, void** arguments, void** extra) {
  return launch(f, c->grid[0], c->grid[1], c->grid[2], c->block[0] * c->block[1] * c->block[2], c->shared, c->stream);
}
API int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void* stream, void** arguments, void** extra) {
  return launch(f, x, y, z, bx * by * bz, shared, stream);
}
API int cuLaunchCooperativeKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                                  unsigned shared, void* stream, void** arguments) {
  return launch(f, x, y, z, bx * by * bz, shared, stream);
}

API int cuGetErrorString(int e, const char** text) { *text = "null driver error"; return 0; }
API int cuGetErrorName(int e, const char** text) { *text = "NULL_ERROR"; return 0; }
API int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
  if (status) *status = !*function;
  return 0;
}

// Asked for by name, and never waited for.
#define SUCCEEDS(name) API int name() { return 0; }
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxPushCurrent)
SUCCEEDS(cuCtxPopCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuMemAddressFree)
SUCCEEDS(cuMemAddressReserve)
SUCCEEDS(cuMemCreate)
SUCCEEDS(cuMemExportToShareableHandle)
SUCCEEDS(cuMemGetAddressRange)
SUCCEEDS(cuMemGetAllocationGranularity)
SUCCEEDS(cuMemGetAllocationPropertiesFromHandle)
SUCCEEDS(cuMemImportFromShareableHandle)
SUCCEEDS(cuMemMap)
SUCCEEDS(cuMemRelease)
SUCCEEDS(cuMemRetainAllocationHandle)
SUCCEEDS(cuMemSetAccess)
SUCCEEDS(cuMemUnmap)
SUCCEEDS(cuMemsetD32Async)
SUCCEEDS(cuMulticastAddDevice)
SUCCEEDS(cuMulticastBindMem)
SUCCEEDS(cuMulticastCreate)
SUCCEEDS(cuMulticastUnbind)
SUCCEEDS(cuStreamWriteValue32)
SUCCEEDS(cuGreenCtxCreate)
SUCCEEDS(cuGreenCtxDestroy)
SUCCEEDS(cuGreenCtxStreamCreate)
SUCCEEDS(cuDevResourceGenerateDesc)
SUCCEEDS(cuDevSmResourceSplitByCount)
SUCCEEDS(cuDeviceGetDevResource)
SUCCEEDS(cuCtxFromGreenCtx)
SUCCEEDS(cuLogsRegisterCallback)
SUCCEEDS(cuLogsUnregisterCallback)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
