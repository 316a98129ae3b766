// torch's current CUDA stream.
#pragma once

#include <cstdint>

// Declared here, weak: only libtorch_cuda has it, and this library must load where there is none. torch's own header declares it strong.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
