// The row kernels of python/logitless/backends/__init__.py on a CUDA device, and `fused`, which is all of them in one
// launch. They calculate in float32; chunks and gradients may be float32, bfloat16 or float16.
//
// Pointers are to tensors on the device; a null pointer is an input not given or an output not wanted. Per-row tensors
// are [rows]; rows of z, rows and out are `stride` elements apart, their columns are adjacent. Launchers put their work
// on `stream` of device number `device`, whichever device is current, and return a cudaError_t. Nothing here needs a
// CUDA header, and nothing touches CUDA before the first call.

#pragma once

#include <cstdint>

#include "../cpu/rows.h"

namespace logitless::cuda {

constexpr int most_terms = 16;

enum class Type : int { float32, bfloat16, float16 };

struct Chunk {  // s = outer * phi(inner * (z + bias)), phi the identity (then inner is not used) or tanh
    const void* z;
    std::int64_t stride;
    Type type;
    const float* bias;   // [columns]
    const float* outer;  // per row
    float inner;
    bool capped;
    const float* floor;  // per row, null means none: s = -inf where z + bias < floor, and slope 0 where s = -inf
};

struct Statistics {
    const std::int64_t* targets;
    const float* weights;  // [columns], null means ones
    double *max, *sum, *target, *first, *square, *weighted, *mass, *teacher_max, *teacher_sum, *forward, *reverse;
    std::int64_t* argmax;
};

struct Term {  // a divergence or a log-sum
    int functor;                                        // number in RowSums of math/divergences.h
    const float* parameters[RowSums::most_parameters];  // each per row
    const float* coefficient;                           // per row; of its slope in a gradient
    double *value, *slope;                              // per row: sum_j f_j, sum_j h_j, or log sum_j e^(x_j), b
};

struct Combination {
    const float *one_hot, *q, *q_lse, *p, *weights, *q_log_q, *q_squared, *q_log_ratio;  // coefficients, per row
    const std::int64_t* targets;
    const float* weight_vector;  // [columns], null means ones
    const float* rows;
    std::int64_t rows_stride;
    const bool* live;
    Term terms[most_terms];
    int term_count;
};

struct Output {
    void* to;
    std::int64_t stride;
    Type type;
};

// What all launchers take; each reads and writes its part of it.
struct Call {
    std::int64_t rows, columns;
    Chunk student, teacher;  // teacher.z null: none
    Statistics statistics;
    Normalizers normalizers;
    Combination combination;
    Output output;
};

}  // namespace logitless::cuda

extern "C" {
int logitless_cuda_statistics(const logitless::cuda::Call* call, int device, void* stream);
int logitless_cuda_generic(const logitless::cuda::Call* call, int device, void* stream);
int logitless_cuda_gradient(const logitless::cuda::Call* call, int device, void* stream);
// Statistics, sums of the terms and the gradient, from open coefficients: q gets its balance (see engine/statistics.py)
// here. All accumulators that the balance reads must have a place, also those that nobody else wants. No log-sums.
int logitless_cuda_fused(const logitless::cuda::Call* call, int device, void* stream);
// 0 if the device can run these kernels.
int logitless_cuda_probe(int device);
const char* logitless_cuda_error(int error);
}
