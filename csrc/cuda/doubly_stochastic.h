// Doubly stochastic matrices from logits on a CUDA device, see python/logitless/ops/sinkhorn/doubly_stochastic.py.
//
// Pointers are to contiguous float32 tensors on the device. The launcher puts its work on `stream` of device number
// `device`, whichever device is current, and returns a cudaError_t.

#pragma once

#include <cstdint>

#include "../math/doubly_stochastic.h"

namespace logitless::cuda {

struct DoublyStochastic {
    const float* logits;    // [matrices, n, n], n <= 64
    const float* gradient;  // of the result, the same shape; null: the result is wanted, else the logits' gradient
    float* out;             // the one or the other
    float* residual;        // [matrices]: the largest distance of a row or column sum of the result from 1; may be null
    std::int64_t matrices;
    int n, iterations;
    Dialect dialect;
};

}  // namespace logitless::cuda

extern "C" int logitless_cuda_doubly_stochastic(const logitless::cuda::DoublyStochastic* call, int device,
                                                void* stream);
