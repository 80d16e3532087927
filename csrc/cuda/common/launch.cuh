// What every launcher does around a kernel: the device of its tensors, torch's current stream, and the launch check.
#pragma once
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
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

}  // namespace triskele::cuda
