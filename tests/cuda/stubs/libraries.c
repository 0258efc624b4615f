// cuBLAS, cuDNN (its old interface: TORCH_CUDNN_V8_API_DISABLED=1) and whatever else torch links to.
#include "null.h"

#define SUCCEEDS(name) API int name() { return 0; }
// On the stream that this thread has last given to a handle.
static __thread void* at_work = NULL;
static int product(const char* name, void* stream) {
  write_log("%s\n", name);
  return count_on(COUNT_products, stream) ? 14 : 0;  // an internal error
}
#define PRODUCT(name) API int name() { return product(#name, at_work); }
#define TAKES_STREAM(name) API int name(void* handle, void* stream) { at_work = stream; return 0; }
#define MAKES(name) API int name(void** handle) { *handle = new_handle(); return 0; }
#define TELLS_ZERO(name) API int name(void* handle, int* value) { *value = 0; return 0; }

MAKES(cublasCreate_v2)
MAKES(cublasLtCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatmulDescCreate)
SUCCEEDS(cublasSetWorkspace_v2)
TAKES_STREAM(cublasSetStream_v2)
TAKES_STREAM(cudnnSetStream)
TELLS_ZERO(cublasGetMathMode)
TELLS_ZERO(cublasGetPointerMode_v2)
API size_t cublasLtGetVersion(void) { return 130101; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
API int cublasLtMatmul(void* handle, void* operation, void* alpha, void* a, void* a_layout, void* b, void* b_layout,
                       void* beta, void* c, void* c_layout, void* d, void* d_layout, void* algorithm, void* workspace,
                       size_t bytes, void* stream) {
  return product("cublasLtMatmul", stream);
}
API int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *layout = new_handle();
  write_log("product's matrix %lu x %lu, stride %ld, type %d\n", rows, columns, stride, type);
  return 0;
}
API int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d,
                                       void* preference, int wanted, void* results, int* found) {
  memset(results, 0, 96);
  *found = 1;
  return 0;
}

MAKES(cudnnCreate)
MAKES(cudnnCreateTensorDescriptor)
MAKES(cudnnCreateFilterDescriptor)
MAKES(cudnnCreateConvolutionDescriptor)
MAKES(cudnnCreateActivationDescriptor)
MAKES(cudnnCreateDropoutDescriptor)
PRODUCT(cudnnConvolutionForward)
API int cudnnGetConvolutionForwardWorkspaceSize(void* handle, void* x, void* w, void* convolution, void* y,
                                                int algorithm, size_t* bytes) {
  *bytes = 0;
  return 0;
}
API int cudnnGetConvolutionForwardAlgorithm_v7(void* handle, void* x, void* w, void* convolution, void* y, int wanted,
                                               int* found, void* results) {
  memset(results, 0, 48);
  ((int*)results)[0] = *found = 1;
  return 0;
}
API size_t cudnnGetVersion(void) { return 92400; }
API size_t cudnnGetCudartVersion(void) { return 13000; }
API const char* cudnnGetErrorString(int status) { return "null cudnn"; }
