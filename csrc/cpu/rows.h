// The row kernels of python/logitless/backends/__init__.py for float32 chunks on a CPU.
//
// All pointers are to tensors of the caller; a null pointer is an input not given or an output not wanted. Per-row
// tensors are [rows], rows of z, rows and out are `stride` floats apart, their columns are adjacent.

#pragma once

#include <cstdint>

#include "../math/divergences.h"

namespace logitless {

struct Chunk {  // s = outer * phi(inner * (z + bias)), phi the identity (then inner is not used) or tanh
    const float* z = nullptr;
    std::int64_t stride = 0;
    const float* bias = nullptr;   // [columns]
    const float* outer = nullptr;  // per row
    float inner = 0;
    bool capped = false;
    const float* floor = nullptr;  // per row, null means none: s = -inf where z + bias < floor, and slope 0 where s = -inf
};

struct Pair {  // what all kernels read
    std::int64_t columns;
    Chunk student, teacher;
};

struct Normalizers {  // per row
    const float *max, *log_sum, *teacher_max, *teacher_log_sum;
};

struct Statistics {
    Pair chunks;
    const std::int64_t* targets;
    const float* weights;  // [columns], null means ones
    double *max, *sum, *target, *first, *square, *weighted, *teacher_max, *teacher_sum, *forward, *reverse;
    std::int64_t* argmax;
};

struct Divergence {
    int functor;                                        // number in RowSums of math/divergences.h
    const float* parameters[RowSums::most_parameters];  // each per row
    const float* coefficient;                           // per row; of its slope in a gradient
};

struct Generic {
    Pair chunks;
    Normalizers normalizers;
    Divergence divergence;
    double *value, *slope;
};

struct Gradient {
    Pair chunks;
    Normalizers normalizers;
    const float *one_hot, *q, *p, *weights, *q_log_q, *q_squared, *q_log_ratio;  // coefficients, per row
    const std::int64_t* targets;
    const float* weight_vector;  // [columns], null means ones
    const Divergence* divergences;
    int divergence_count;
    const float* rows;
    std::int64_t rows_stride;
    const bool* live;
    float* out;
    std::int64_t out_stride;
};

enum class Filter { min_p, top_p, top_k };  // python/logitless/support.py

struct Floors {
    Pair chunks;    // the student alone
    Filter filter;
    double number;  // log p, p or k
    float* floors;  // per row
};

// rows.cpp, once per instruction set. Each kernel does the rows [begin, end); rows are independent.
struct RowKernels {
    void (*statistics)(const Statistics&, std::int64_t begin, std::int64_t end);
    void (*generic)(const Generic&, std::int64_t begin, std::int64_t end);
    void (*gradient)(const Gradient&, std::int64_t begin, std::int64_t end);
    void (*floors)(const Floors&, std::int64_t begin, std::int64_t end);

    static const RowKernels baseline, avx2, avx512;  // copies.h
};

}  // namespace logitless
