// The CUDA runtime calls that launchers make, and what the compiler's checks call. Linked into each emulated library,
// its names hidden, so that a CUDA runtime in the same process is not in the way.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "runtime.h"
#include "tensor_map.h"

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an emulated CUDA error"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulate::processors(); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

// cuTensorMapEncodeTiled with the requirements that the driver API's reference states.
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  emulate::TensorMap made{};
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: made.element_bytes = 1; break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: made.element_bytes = 2; break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: made.element_bytes = 4; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: made.swizzle = 0; break;
    case CU_TENSOR_MAP_SWIZZLE_32B: made.swizzle = 1; break;
    case CU_TENSOR_MAP_SWIZZLE_64B: made.swizzle = 2; break;
    case CU_TENSOR_MAP_SWIZZLE_128B: made.swizzle = 3; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  const uint64_t inner = uint64_t(box[0]) * made.element_bytes;
  if (inner % 16 != 0 || (made.swizzle > 0 && inner > 16u << made.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (sizes[d] < 1 || sizes[d] > uint64_t(1) << 32 || box[d] < 1 || box[d] > 256 || steps[d] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (d > 0 && (strides[d - 1] % 16 != 0 || strides[d - 1] >= uint64_t(1) << 40)) return CUDA_ERROR_INVALID_VALUE;
    made.size[d] = sizes[d];
    made.box[d] = static_cast<uint16_t>(box[d]);
    if (d > 0) made.stride[d - 1] = strides[d - 1];
  }
  made.mark = emulate::TensorMap::kMark;
  made.rank = static_cast<uint8_t>(rank);
  made.base = reinterpret_cast<uintptr_t>(base);
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *found = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

int torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function, uint32_t line, bool,
                             char** message) {
  *message = nullptr;
  if (error == 0) return 0;
  const char* format = "%s:%u, %s: CUDA error %d, or a call that is not emulated";
  if (asprintf(message, format, file, line, function, error) < 0) *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }

// -fsanitize=alignment,bounds
struct Place {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1_abort(const Place* place, uintptr_t pointer) {
  char text[300];
  snprintf(text, sizeof text, "%s:%u:%u: misaligned or null address %#lx", place->file, place->line, place->column,
           static_cast<unsigned long>(pointer));
  emulate::abandon(text);
}
void __ubsan_handle_out_of_bounds_abort(const Place* place, uintptr_t index) {
  char text[300];
  snprintf(text, sizeof text, "%s:%u:%u: index %ld out of bounds", place->file, place->line, place->column,
           static_cast<long>(index));
  emulate::abandon(text);
}

}
