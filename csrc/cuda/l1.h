// The L1 distance between softmaxes on a CUDA device, see python/logitless/ops/sinkhorn/kernels.py.
//
// Pointers are to tensors on the device. Launchers put their work on `stream` of device number `device`, whichever
// device is current, and return a cudaError_t.

#pragma once

#include <cstdint>

#include "rows.h"

namespace logitless::cuda {

struct Probabilities {  // p_iv = e^(s - max) / sum, `tokens` rows of the chunk per problem
    Chunk chunk;
    const double *max, *sum;  // per row
    int tokens;
};

struct L1 {
    Probabilities p, q;
    int problems;
    std::int64_t columns;
    // forward: sums over the columns of each part
    double *cost, *moments;  // [parts, problems, n, m]; moments null: not wanted
    int parts;
    // backward
    const float* gradient;  // [problems, n, m], of these strides
    const double* given;    // moments of whole rows, alike
    std::int64_t gradient_strides[3], given_strides[3];
    float* out;  // [problems n, columns], rows out_stride apart
    std::int64_t out_stride;
};

}  // namespace logitless::cuda

extern "C" {
// How many parts of the columns fill the device.
int logitless_cuda_l1_parts(const logitless::cuda::L1* call, int device);
int logitless_cuda_l1(const logitless::cuda::L1* call, int device, void* stream);
int logitless_cuda_l1_backward(const logitless::cuda::L1* call, int device, void* stream);
}
