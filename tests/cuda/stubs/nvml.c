// NVML, libnvidia-ml.so.1: free memory, as our preflight asks for it, and no links between devices.
#include "null.h"

enum { INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };
API int nvmlInit_v2(void) { return 0; }
API int nvmlInit(void) { return 0; }
API int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  *device = (void*)32;
  return strncmp(uuid, "GPU-", 4) ? INVALID_ARGUMENT : 0;
}
API int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** device) { *device = (void*)32; return 0; }
API int nvmlDeviceGetMemoryInfo(void* device, unsigned long long* total_free_used) {
  total_free_used[0] = device_bytes();
  total_free_used[2] = (unsigned long long)(env_double("NULLCUDA_USED_GIB", 0.5) * (1 << 30));
  total_free_used[1] = total_free_used[0] - total_free_used[2];
  return 0;
}
API int nvmlDeviceGetComputeRunningProcesses(void* device, unsigned* n, void* processes) { *n = 0; return 0; }
API int nvmlDeviceGetNvLinkRemoteDeviceType() { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2() { return NOT_SUPPORTED; }
API int nvmlDeviceGetGpuFabricInfoV() { return NOT_SUPPORTED; }
API int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 13000; return 0; }
