// csrc/cuda/common/launch.cuh for the emulator: the same names, on CPU tensors. device.h comes first by -include.
#pragma once

namespace triskele::cuda {

struct Launch {
  explicit Launch(const torch::stable::Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline void check_launch() {}

// Each library's thread-local segment, where its static shared variables are, exists from the first use on.
inline thread_local volatile char thread_local_segment = 0;

template <class... Parameters, class... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t, Arguments&&... arguments) {
  const std::tuple<std::remove_cv_t<Parameters>...> values{static_cast<Parameters>(arguments)...};
  thread_local_segment = 0;
  emulate::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { std::apply(kernel, values); },
               cluster);
}

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  launch_clusters(1, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace triskele::cuda

#define TRISKELE_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emulate::dynamic_shared())
#define TRISKELE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(triskele_emulated, CPU, m)
