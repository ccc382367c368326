// Whether this library holds code for a GPU: asked of the driver, which also compiles PTX for one.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

namespace fastsae {
namespace {

__global__ void image_kernel() {}

// Empty when the code loads on the device, else the driver's reason.
std::string cuda_image(int64_t device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device));
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, image_kernel);
  cudaSetDevice(before);
  cudaGetLastError();  // "no kernel image" is an answer here, not an error for the next call
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fastsae

// No tensor arguments, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_cuda_image", TORCH_BOX(&fastsae::cuda_image));
}
