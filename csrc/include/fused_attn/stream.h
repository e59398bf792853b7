// Which CUDA stream is current, asked of torch. The function lives in torch's CUDA build alone, and a library linked beside a CPU build has
// to find it beside a CUDA build, so it is looked up when the first CUDA tensor comes; the legacy stream never stands in for it.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fused_attn {

using CurrentStream = int32_t (*)(int32_t device, void** stream);  // returns 0 when all is well

// Python loads torch with RTLD_LOCAL. RTLD_DEFAULT searches what this library itself needs as well: libtorch, and below it whatever the
// torch of this process consists of. Where a linker dropped that need, libtorch_cuda is asked by its name, if it is loaded.
inline CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);
  void* torch = found != nullptr ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch != nullptr) found = dlsym(torch, kName);
  return reinterpret_cast<CurrentStream>(found);
}

inline void* current_stream(int32_t device) {
  static const CurrentStream get = find_current_stream();
  if (get == nullptr) {
    throw std::runtime_error(
        "the cuda backend must launch on torch's current CUDA stream; got a torch that does not say which one that is (no "
        "aoti_torch_get_current_cuda_stream in this process). Install a CUDA build of torch 2.10 or later, or use backend='triton'.");
  }
  void* stream = nullptr;
  if (get(device, &stream) != 0) {
    throw std::runtime_error("the cuda backend must launch on torch's current CUDA stream; got an error from torch for device " +
                             std::to_string(device) + ". Check that the device exists and torch.cuda works on it.");
  }
  return stream;
}

}  // namespace fused_attn
