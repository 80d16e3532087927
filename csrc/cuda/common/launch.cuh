// What every launcher does around a kernel: the device of its tensors, torch's current stream, and the launch check.
#pragma once
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace triskele::cuda {

// Makes the tensor's device current while it lives, and holds torch's stream there.
struct Launch {
  explicit Launch(const torch::stable::Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

inline void check_launch() { STD_CUDA_CHECK(cudaGetLastError()); }

// Lets a kernel have more than 48 KB where it must.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t shared_bytes) {
  if (shared_bytes > 48 * 1024) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
}

// kernel<<<grid, block, shared bytes, stream>>>(arguments...), checked.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  allow_shared(kernel, shared_bytes);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_launch();
}

// The same in clusters of this many neighbours along x, of which grid.x is a multiple (sm_90 and later).
template <class... Parameters, class... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, Arguments&&... arguments) {
  allow_shared(kernel, shared_bytes);
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = static_cast<unsigned>(cluster);
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &size;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  check_launch();
}

}  // namespace triskele::cuda

// The dynamic shared memory of a kernel, aligned for TMA's widest swizzle.
#define TRISKELE_DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]

// Registers a file's kernels for the ops that csrc/schema.cpp defines.
#define TRISKELE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(triskele_native, CUDA, m)
