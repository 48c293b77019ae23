// cuBLAS, cuBLASLt and cuDNN as far as torch calls them. A call is recorded as a launch of its name: what kernels these
// libraries would choose is not known. NVIDIA's own have a CUDA runtime inside that does not start here; of theirs,
// only cuDNN's descriptors, which need no device, are used.
// The headers of these types need a toolkit's; here they are only pointed to.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cudnn.h>

#include <cstdint>
#include <cstring>
#include <string>

#undef CUBLASAPI
#define EXPORTED __attribute__((visibility("default")))
#define BLAS extern "C" EXPORTED cublasStatus_t
#define DNN extern "C" EXPORTED cudnnStatus_t

// libcuda.so.1's
extern "C" CUresult null_gpu_library_call(const char* name, CUstream stream);
extern "C" CUresult null_gpu_library_call_on(const char* name, CUstream stream, void* const* addresses, int count);
extern "C" void null_gpu_complain(const char* text);

namespace {

struct Handle {  // of cuBLAS and of cuDNN
  cudaStream_t stream = nullptr;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
  cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
};
Handle& of(void* handle) { return *static_cast<Handle*>(handle); }

// cuBLASLt's descriptors and cuDNN's of a backend. Of what they hold, only the addresses of a call are kept.
struct Descriptor {
  char content[256];
  void* addresses[4];
  int count;
};

template <class T>
cublasStatus_t create(T* descriptor) {
  *descriptor = reinterpret_cast<T>(new Descriptor{});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t destroy(void* descriptor) {
  delete static_cast<Descriptor*>(descriptor);
  return CUBLAS_STATUS_SUCCESS;
}

int refuse(const char* name, int status) {
  null_gpu_complain((std::string(name) + " is not implemented").c_str());
  return status;
}

}  // namespace

// Functions whose first argument is the handle, recorded and refused. Both libraries' success is 0, as CUDA's is.
#define RECORDED(name)                                           \
  extern "C" EXPORTED int name##_recorded(void*) __asm__(#name); \
  extern "C" EXPORTED int name##_recorded(void* handle) { return null_gpu_library_call(#name, of(handle).stream); }
#define REFUSED(name, status)                              \
  extern "C" EXPORTED int name##_refused() __asm__(#name); \
  extern "C" EXPORTED int name##_refused() { return refuse(#name, status); }

// ---- cuBLAS ----

BLAS cublasCreate_v2(cublasHandle_t* handle) {
  *reinterpret_cast<Handle**>(handle) = new Handle;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasDestroy_v2(cublasHandle_t handle) {
  delete &of(handle);
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  of(handle).stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
BLAS cublasSetSmCountTarget(cublasHandle_t, int) { return CUBLAS_STATUS_SUCCESS; }

BLAS cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  of(handle).math = mode;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
  *mode = of(handle).math;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  of(handle).pointers = mode;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
  *mode = of(handle).pointers;
  return CUBLAS_STATUS_SUCCESS;
}

#define RECORDED_OF_ALL_TYPES(name) \
  RECORDED(cublasS##name) RECORDED(cublasD##name) RECORDED(cublasC##name) RECORDED(cublasZ##name)
RECORDED_OF_ALL_TYPES(gemm_v2)
RECORDED_OF_ALL_TYPES(gemmStridedBatched)
RECORDED_OF_ALL_TYPES(gemv_v2)
RECORDED_OF_ALL_TYPES(trsm_v2)
RECORDED_OF_ALL_TYPES(trsmBatched)
RECORDED_OF_ALL_TYPES(gelsBatched)
RECORDED_OF_ALL_TYPES(geqrfBatched)
RECORDED_OF_ALL_TYPES(getrfBatched)
RECORDED_OF_ALL_TYPES(getrsBatched)
RECORDED(cublasSdot_v2)
RECORDED(cublasDdot_v2)
RECORDED(cublasCdotc_v2)
RECORDED(cublasCdotu_v2)
RECORDED(cublasZdotc_v2)
RECORDED(cublasZdotu_v2)
RECORDED(cublasDotEx)

BLAS cublasGemmEx(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int, int, int, const void*,
                  const void* a, cudaDataType, int, const void* b, cudaDataType, int, const void*, void* c,
                  cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
  void* const addresses[] = {const_cast<void*>(a), const_cast<void*>(b), c};
  return static_cast<cublasStatus_t>(null_gpu_library_call_on("cublasGemmEx", of(handle).stream, addresses, 3));
}

RECORDED(cublasSgemmEx)
RECORDED(cublasGemmStridedBatchedEx)

// ---- cuBLASLt ----

extern "C" EXPORTED size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

BLAS cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t, cudaDataType_t) { return create(out); }
BLAS cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t descriptor) { return destroy(descriptor); }
BLAS cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType, uint64_t, uint64_t, int64_t) {
  return create(out);
}
BLAS cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t descriptor) { return destroy(descriptor); }
BLAS cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) { return create(out); }
BLAS cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t descriptor) { return destroy(descriptor); }
BLAS cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*,
                                          size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                    cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result,
                                    int* count) {
  *result = {};
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void* a, cublasLtMatrixLayout_t,
                    const void* b, cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void* d,
                    cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t stream) {
  void* const addresses[] = {const_cast<void*>(a), const_cast<void*>(b), d};
  return static_cast<cublasStatus_t>(null_gpu_library_call_on("cublasLtMatmul", stream, addresses, 3));
}

REFUSED(cublasLtMatmulAlgoCheck, CUBLAS_STATUS_NOT_SUPPORTED)
REFUSED(cublasLtMatmulAlgoConfigGetAttribute, CUBLAS_STATUS_NOT_SUPPORTED)
REFUSED(cublasLtMatmulAlgoConfigSetAttribute, CUBLAS_STATUS_NOT_SUPPORTED)
REFUSED(cublasLtMatmulAlgoInit, CUBLAS_STATUS_NOT_SUPPORTED)

// ---- cuDNN ----

DNN cudnnCreate(cudnnHandle_t* handle) {
  *reinterpret_cast<Handle**>(handle) = new Handle;
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnDestroy(cudnnHandle_t handle) {
  delete &of(handle);
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  of(handle).stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  *stream = of(handle).stream;
  return CUDNN_STATUS_SUCCESS;
}

// Every convolution has one algorithm, which needs no workspace.
template <class Performance, class Algorithm>
static cudnnStatus_t only_algorithm(Performance* result, int* count, Algorithm algorithm) {
  *result = {};
  result->algo = algorithm;
  result->status = CUDNN_STATUS_SUCCESS;
  result->time = 1;
  result->determinism = CUDNN_DETERMINISTIC;
  result->mathType = CUDNN_TENSOR_OP_MATH;
  *count = 1;
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t no_bytes(size_t* size) {
  *size = 0;
  return CUDNN_STATUS_SUCCESS;
}

using Tensor = cudnnTensorDescriptor_t;
using Filter = cudnnFilterDescriptor_t;
using Convolution = cudnnConvolutionDescriptor_t;
using Activation = cudnnActivationDescriptor_t;

DNN cudnnGetConvolutionForwardAlgorithm_v7(cudnnHandle_t, Tensor, Filter, Convolution, Tensor, int, int* count,
                                           cudnnConvolutionFwdAlgoPerf_t* result) {
  return only_algorithm(result, count, CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM);
}

DNN cudnnGetConvolutionBackwardDataAlgorithm_v7(cudnnHandle_t, Filter, Tensor, Convolution, Tensor, int, int* count,
                                                cudnnConvolutionBwdDataAlgoPerf_t* result) {
  return only_algorithm(result, count, CUDNN_CONVOLUTION_BWD_DATA_ALGO_1);
}

DNN cudnnGetConvolutionBackwardFilterAlgorithm_v7(cudnnHandle_t, Tensor, Tensor, Convolution, Filter, int, int* count,
                                                  cudnnConvolutionBwdFilterAlgoPerf_t* result) {
  return only_algorithm(result, count, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1);
}

DNN cudnnFindConvolutionForwardAlgorithmEx(cudnnHandle_t, Tensor, const void*, Filter, const void*, Convolution, Tensor,
                                           void*, int, int* count, cudnnConvolutionFwdAlgoPerf_t* result, void*,
                                           size_t) {
  return only_algorithm(result, count, CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM);
}

DNN cudnnFindConvolutionBackwardDataAlgorithmEx(cudnnHandle_t, Filter, const void*, Tensor, const void*, Convolution,
                                                Tensor, void*, int, int* count,
                                                cudnnConvolutionBwdDataAlgoPerf_t* result, void*, size_t) {
  return only_algorithm(result, count, CUDNN_CONVOLUTION_BWD_DATA_ALGO_1);
}

DNN cudnnFindConvolutionBackwardFilterAlgorithmEx(cudnnHandle_t, Tensor, const void*, Tensor, const void*, Convolution,
                                                  Filter, void*, int, int* count,
                                                  cudnnConvolutionBwdFilterAlgoPerf_t* result, void*, size_t) {
  return only_algorithm(result, count, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1);
}

DNN cudnnGetConvolutionForwardWorkspaceSize(cudnnHandle_t, Tensor, Filter, Convolution, Tensor,
                                            cudnnConvolutionFwdAlgo_t, size_t* size) {
  return no_bytes(size);
}

DNN cudnnGetConvolutionBackwardDataWorkspaceSize(cudnnHandle_t, Filter, Tensor, Convolution, Tensor,
                                                 cudnnConvolutionBwdDataAlgo_t, size_t* size) {
  return no_bytes(size);
}

DNN cudnnGetConvolutionBackwardFilterWorkspaceSize(cudnnHandle_t, Tensor, Tensor, Convolution, Filter,
                                                   cudnnConvolutionBwdFilterAlgo_t, size_t* size) {
  return no_bytes(size);
}

DNN cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t,
                                                             Tensor, Tensor, Tensor, Tensor, Activation, size_t* size) {
  return no_bytes(size);
}

DNN cudnnGetBatchNormalizationBackwardExWorkspaceSize(cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, Tensor,
                                                      Tensor, Tensor, Tensor, Tensor, Tensor, Activation,
                                                      size_t* size) {
  return no_bytes(size);
}

DNN cudnnGetBatchNormalizationTrainingExReserveSpaceSize(cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t,
                                                         Activation, Tensor, size_t* size) {
  return no_bytes(size);
}

RECORDED(cudnnConvolutionForward)
RECORDED(cudnnConvolutionBackwardData)
RECORDED(cudnnConvolutionBackwardFilter)
RECORDED(cudnnConvolutionBiasActivationForward)
RECORDED(cudnnPoolingForward)
RECORDED(cudnnBatchNormalizationForwardInference)
RECORDED(cudnnBatchNormalizationForwardTrainingEx)
RECORDED(cudnnBatchNormalizationBackwardEx)

REFUSED(cudnnCTCLoss, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnCTCLoss_v8, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnGetCTCLossWorkspaceSize, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnGetCTCLossWorkspaceSize_v8, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnDropoutGetStatesSize, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnRestoreDropoutDescriptor, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnSetDropoutDescriptor, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnGetRNNTempSpaceSizes, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnGetRNNWeightParams, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnGetRNNWeightSpaceSize, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnRNNBackwardData_v8, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnRNNBackwardWeights_v8, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnRNNForward, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnSpatialTfGridGeneratorBackward, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnSpatialTfGridGeneratorForward, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnSpatialTfSamplerBackward, CUDNN_STATUS_NOT_SUPPORTED)
REFUSED(cudnnSpatialTfSamplerForward, CUDNN_STATUS_NOT_SUPPORTED)

// ---- cuDNN's backend: every graph of operations has one engine, without notes, knobs or workspace ----

DNN cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* out) {
  create(out);
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  destroy(descriptor);
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                             cudnnBackendAttributeType_t, int64_t count, const void* values) {
  auto* pack = reinterpret_cast<Descriptor*>(descriptor);
  if (name == CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS && count <= 4) {
    pack->count = static_cast<int>(count);
    std::memcpy(pack->addresses, values, count * sizeof(void*));
  }
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnBackendFinalize(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }

DNN cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name,
                             cudnnBackendAttributeType_t type, int64_t requested, int64_t* count, void* out) {
  bool one = false;
  int64_t value = 0;
  switch (name) {
    case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT: value = 1; [[fallthrough]];
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
    case CUDNN_ATTR_ENGINECFG_ENGINE:
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINEHEUR_RESULTS:
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE: one = true; break;
    default: break;
  }
  if (count) *count = one;
  if (one && out && requested > 0 && type == CUDNN_TYPE_INT64) memcpy(out, &value, sizeof value);
  return CUDNN_STATUS_SUCCESS;
}

DNN cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t pack) {
  const auto* of_pack = reinterpret_cast<const Descriptor*>(pack);
  return static_cast<cudnnStatus_t>(
      null_gpu_library_call_on("cudnnBackendExecute", of(handle).stream, of_pack->addresses, of_pack->count));
}
