// Passes over rows in global memory, between the two .cu files. `closing`: normalizers and the balance of q come from
// the accumulators that the call's statistics (and terms) have left; else both are given.

#pragma once

#include <cuda_runtime_api.h>

#include "rows.h"

namespace logitless::cuda {

cudaError_t generic_pass(const Call& call, bool closing, int device, void* stream);
cudaError_t gradient_pass(const Call& call, bool closing, int device, void* stream);

}  // namespace logitless::cuda
