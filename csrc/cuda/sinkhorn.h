// Sinkhorn on a CUDA device: whole runs of small problems, and half-iterations and iterations on a stored cost; see
// SinkhornKernels in python/logitless/ops/sinkhorn/kernels.py.
//
// Pointers are to float32 tensors on the device, contiguous but for the cost. Launchers put their work on `stream` of
// device number `device`, whichever device is current, and return a cudaError_t.

#pragma once

#include <cstdint>

namespace logitless::cuda {

struct SinkhornProblems {
    const float* cost;  // [B, n, m]
    std::int64_t strides[3];
    const float *a, *b;      // [B, n], [B, m]: weights
    const float* g;          // [B, m]: where the run starts
    const float* annealed;   // [annealed_count]: the epsilons of the first iterations; then `epsilon`
    int count, n, m;
    int annealed_count, limit;
    float epsilon, tolerance;  // tolerance negative: exactly `limit` iterations
    float rho_a, rho_b;        // inf: balanced
};

struct SinkhornRun {
    float *f, *g, *rows;      // [B, n], [B, m], [B, n]
    bool* reached;            // [B, m]
    std::int64_t* iterations;  // [B]
    bool* stopped;            // [B]
    float *history_f, *history_g;  // [limit, B, n], [limit, B, m]; null: not wanted
    int* last;                     // [B]: the iteration that is returned; with the histories
};

struct SinkhornGradients {
    float *of_cost, *of_a, *of_b;  // [B, n, m], [B, n], [B, m]; of_cost, or of_a and of_b, null: not wanted
};

struct SinkhornRunBackward {
    float *history_f, *history_g;
    const int* last;
    const float *of_f, *of_g;  // cotangents
    SinkhornGradients gradients;
};

// <P, C> of a run's plan, and its gradient.
struct SinkhornTransport {
    float* value;                  // [B]
    float *history_f, *history_g;  // room for a run's, [limit, B, n], [limit, B, m]; null: no gradient
    SinkhornGradients gradients;
};

struct SoftMin {
    const float* cost;  // [count, n, m]: the columns adjacent, or the rows
    std::int64_t strides[3];
    const float* c;   // [count, m]
    float* s;         // [count, n]
    float* partials;  // [parts, count, n, 2], where there is more than one part
    int count, n, m, parts;
    float epsilon;
};

struct Iteration {
    const float* cost;                   // [count, n, m]: the columns adjacent
    std::int64_t strides[2];             // of problems and rows
    const float *c, *log_a;              // [count, m], [count, n]
    float *s, *t;                        // [count, n], [count, m]
    float *sums, *exponents, *weighted;  // scratch: [count, parts, m], [count, parts], [count, n]
    int count, n, m, parts;
    float damping, epsilon;
};

}  // namespace logitless::cuda

extern "C" {
// Whether a problem fits: n and m at most 1024, and the shared memory of a block.
int logitless_cuda_sinkhorn_fits(int n, int m, int device);
int logitless_cuda_sinkhorn_run(const logitless::cuda::SinkhornProblems* problems,
                                const logitless::cuda::SinkhornRun* run, int device, void* stream);
int logitless_cuda_sinkhorn_run_backward(const logitless::cuda::SinkhornProblems* problems,
                                         const logitless::cuda::SinkhornRunBackward* run, int device, void* stream);
int logitless_cuda_sinkhorn_transport(const logitless::cuda::SinkhornProblems* problems,
                                      const logitless::cuda::SinkhornTransport* run, int device, void* stream);
// Into how many parts rows should be cut.
int logitless_cuda_softmin_parts(const logitless::cuda::SoftMin* call, int device);
int logitless_cuda_softmin(const logitless::cuda::SoftMin* call, int device, void* stream);
// Into how many parts rows should be cut; 0: they are too long.
int logitless_cuda_iteration_parts(const logitless::cuda::Iteration* call, int device);
int logitless_cuda_iteration(const logitless::cuda::Iteration* call, int device, void* stream);
}
