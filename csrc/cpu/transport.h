// Kernels of optimal transport for float32 on a CPU: python/logitless/ops/sinkhorn/kernels.py says what they compute.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../math/doubly_stochastic.h"
#include "rows.h"

namespace logitless {
namespace transport {

struct Probabilities {  // p = exp(s - max) / sum
    Chunk chunk;        // of `tokens` rows per problem
    const double *max, *sum;
    std::int64_t tokens;
};

struct Matrices {  // [problems, own tokens, other tokens]; whatever is transposed has other strides
    const float* gradient;
    const double* moment;
    std::int64_t gradient_strides[3], moment_strides[3];
};

// What both L1 kernels do is shared out as `pieces`: some own tokens of a problem, in one of `segments` of the columns.
struct L1 {
    std::int64_t problems, columns, segments;
    Probabilities own, other;
    double *cost, *moment;  // [segments, problems, own tokens, other tokens]; moment null if not wanted

    static constexpr std::int64_t block = 32;  // tokens of either side whose columns are in cache together

    std::int64_t blocks() const { return (own.tokens + block - 1) / block; }
    std::int64_t pieces() const { return problems * blocks() * segments; }

    // The same for any number of threads, so that the sums are.
    static std::int64_t segments_for(std::int64_t blocks, std::int64_t columns) {
        return std::max<std::int64_t>(1, std::min(32 / std::max<std::int64_t>(1, blocks), (columns + 1023) / 1024));
    }
};

struct L1Backward : L1 {
    Matrices matrices;
    float* out;  // [problems * own tokens, columns]; may be own.chunk.z
    std::int64_t out_stride;
};

struct DoublyStochastic {  // count matrices [n, n]
    int n, iterations;
    Dialect dialect;
    const float *logits, *upstream;
    float *out, *residual;  // the matrices and the residual of each; backward the gradients of the logits
};

// Once per instruction set: l1.cpp. Each does the pieces [begin, end).
struct L1Kernels {
    void (*forward)(const L1&, std::int64_t begin, std::int64_t end);
    void (*backward)(const L1Backward&, std::int64_t begin, std::int64_t end);

    static const L1Kernels baseline, avx2, avx512;  // copies.h
};

struct DoublyStochasticKernels {  // doubly_stochastic.cpp
    void (*forward)(const DoublyStochastic&, std::int64_t begin, std::int64_t end);
    void (*backward)(const DoublyStochastic&, std::int64_t begin, std::int64_t end);

    static const DoublyStochasticKernels baseline, avx2, avx512;  // copies.h
};

}  // namespace transport
}  // namespace logitless
