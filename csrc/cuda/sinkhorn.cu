// Whole Sinkhorn runs of small problems, one launch for all: a block per problem, whose kernel matrix stays in shared
// memory, and each problem stops by itself.
//
// Stabilised scaling: with potentials phi, gamma of some iteration absorbed into
//
//   K_ij = e^((phi_i + gamma_j - C_ij) / epsilon),   u_i = a_i e^((f_i - phi_i) / epsilon),   v_j alike,
//
// a half-iteration is one product with K, and a logarithm and an exponential per row:
//
//   S_i = sum_j K_ij v_j,   s_i = phi_i - epsilon log S_i,   f_i = rho / (rho + epsilon) s_i.
//
// u comes from the rounded f: what is returned is a pair of potentials of which one is the other's.
//
// K is formed anew, from phi_i = min_j (C_ij - g_j) and gamma = g, where a potential has moved by 20 epsilon: an entry
// that K cannot hold is then less than e^-48 of its row. A column that K does not reach at all is summed in the log
// domain, from the cost.
//
// Backward walks the iterations back: the softmax of a half-iteration is W_ij = K_ij u_i / sum_i K_ij u_i, and its
// cotangent of C, sum over halves of W_ij dt_j, is collected as the factor of K. Where sums leave what float32 holds
// (prices rho far below the potentials) the same walk is done with exponentials of the cost.
//
// Memory: C is read once per forming of K (twice in all, often), [B, n, m] floats, and its gradient written once; per
// iteration n + m floats of history, if kept. Shared memory: 2 n m / 32 accesses of a warp per iteration bound it:
// B = 1024, n = m = 64, 20 iterations, 16 MB read: 5.6 us; 320 cycles an iteration, 28 us on 132 processors.

#include "sinkhorn.h"

#include "launch.cuh"

namespace logitless::cuda {
namespace {

constexpr float furthest = 20;                     // epsilons that a potential may move from what K holds
constexpr float smallest = 1e-30f;                 // of a sum; below, the log domain
constexpr int most_size = 1024;                    // of n and m
constexpr int most_block = 256;                    // threads

struct Forward {
    SinkhornProblems problems;
    SinkhornRun run;
};

struct Backward {
    SinkhornProblems problems;
    SinkhornRunBackward run;
};

__host__ __device__ inline int padded(int m) { return m | 1; }  // rows an odd number of floats apart: no collisions

// One problem of a block, and what its threads share. Thread t does rows and columns t, t + threads, ...
struct Solver {
    const SinkhornProblems& p;
    const int n, m, stride, problem;
    const float *a, *b;
    float *f, *u, *phi, *row_1, *row_2, *row_3;         // [n]
    float *g, *v, *gamma, *column_1, *column_2, *column_3;  // [m]
    float *k, *d;                                       // [n, stride]; d backward
    double* sums;                                       // a number per warp
    int* flag;

    static __host__ __device__ int bytes(int n, int m, bool back) {
        return 8 * (most_block / warp_size + 1) + 4 * ((back ? 2 : 1) * n * padded(m) + 6 * (n + m));
    }

    __device__ Solver(const SinkhornProblems& p, int problem, unsigned char* memory)
        : p(p), n(p.n), m(p.m), stride(padded(p.m)), problem(problem), a(p.a + static_cast<std::int64_t>(problem) * n),
          b(p.b + static_cast<std::int64_t>(problem) * m) {
        sums = reinterpret_cast<double*>(memory);
        flag = reinterpret_cast<int*>(sums + most_block / warp_size);
        float* at = reinterpret_cast<float*>(flag + 2);
        const auto take = [&at](int count) {
            float* const taken = at;
            at += count;
            return taken;
        };
        f = take(n), u = take(n), phi = take(n), row_1 = take(n), row_2 = take(n), row_3 = take(n);
        g = take(m), v = take(m), gamma = take(m), column_1 = take(m), column_2 = take(m), column_3 = take(m);
        k = take(n * stride), d = k + n * stride;
    }

    __device__ __forceinline__ float cost(int i, int j) const {
        return p.cost[problem * p.strides[0] + i * p.strides[1] + j * p.strides[2]];
    }
    template <class Function>
    __device__ __forceinline__ void each_row(const Function& function) const {
        for (int i = threadIdx.x; i < n; i += blockDim.x) function(i);
    }
    template <class Function>
    __device__ __forceinline__ void each_column(const Function& function) const {
        for (int j = threadIdx.x; j < m; j += blockDim.x) function(j);
    }
    // As the cost lies in memory, so that its readings are wide.
    template <class Function>
    __device__ __forceinline__ void each_entry(const Function& function) const {
        const bool by_rows = p.strides[2] <= p.strides[1];
        const int inner = by_rows ? m : n;
        for (int e = threadIdx.x; e < n * m; e += blockDim.x) {
            const int outside = e / inner, inside = e - outside * inner;
            by_rows ? function(outside, inside) : function(inside, outside);
        }
    }

    __device__ float epsilon(int iteration) const {
        return iteration < p.annealed_count ? p.annealed[iteration] : p.epsilon;
    }
    static __device__ float damping(float rho, float epsilon) {
        return rho == infinity ? 1.0f : rho / (rho + epsilon);
    }

    // What the plan's marginal should be.
    static __device__ __forceinline__ float optimal(float weight, float potential, float rho) {
        return rho == infinity ? weight : weight * exp(fminf(-potential / rho, 80.0f));
    }

    __device__ __forceinline__ float row_sum(int i, const float* x) const {
        float found[4] = {};
        const float* const row = k + i * stride;
        int j = 0;
        for (; j + 4 <= m; j += 4)
#pragma unroll
            for (int c = 0; c < 4; ++c) found[c] = fmaf(row[j + c], x[j + c], found[c]);
        for (; j < m; ++j) found[0] = fmaf(row[j], x[j], found[0]);
        return (found[0] + found[1]) + (found[2] + found[3]);
    }
    __device__ __forceinline__ float column_sum(int j, const float* x) const {
        float found[4] = {};
        const float* const column = k + j;
        int i = 0;
        for (; i + 4 <= n; i += 4)
#pragma unroll
            for (int c = 0; c < 4; ++c) found[c] = fmaf(column[(i + c) * stride], x[i + c], found[c]);
        for (; i < n; ++i) found[0] = fmaf(column[i * stride], x[i], found[0]);
        return (found[0] + found[1]) + (found[2] + found[3]);
    }

    // The same sum of all threads for all, in the same order always. One barrier must stand between this and the next.
    __device__ double total(double x) {
#pragma unroll
        for (int distance = warp_size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
        if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size] = x;
        block_barrier<51>();
        double found = 0;
        for (int w = 0; w < static_cast<int>(blockDim.x) / warp_size; ++w) found += sums[w];
        return found;
    }

    // K = e^((phi + gamma - C) / e), 0 in rows and columns without weight, of phi and gamma as they stand.
    __device__ void form(float e) {
        const float factor = 1.0f / e;
        each_entry([&](int i, int j) {
            const float x = (gamma[j] - cost(i, j)) + phi[i];
            k[i * stride + j] = a[i] > 0.0f && b[j] > 0.0f ? exp(fminf(x * factor, 80.0f)) : 0.0f;
        });
    }

    // K of the potential g; v is b.
    __device__ void absorb(float e) {
        each_entry([&](int i, int j) { k[i * stride + j] = b[j] > 0.0f ? cost(i, j) - g[j] : infinity; });
        block_barrier<53>();
        each_row([&](int i) {
            float least = infinity;
            for (int j = 0; j < m; ++j) least = fminf(least, k[i * stride + j]);
            phi[i] = least < infinity ? least : 0.0f;
        });
        each_column([&](int j) {
            gamma[j] = g[j];
            v[j] = b[j];
        });
        block_barrier<54>();
        form(e);
        block_barrier<55>();
    }

    // -e log sum_i a_i e^((f_i - C_ij) / e), or over j with b and g, from the cost.
    __device__ float softmin_of_column(int j, float e) const {
        return softmin(n, e, [&](int i) { return a[i] > 0.0f ? f[i] - cost(i, j) : -infinity; }, a);
    }
    __device__ float softmin_of_row(int i, float e) const {
        return softmin(m, e, [&](int j) { return b[j] > 0.0f ? g[j] - cost(i, j) : -infinity; }, b);
    }
    template <class X>
    static __device__ float softmin(int count, float e, const X& x, const float* weights) {
        float top = -infinity, sum = 0;
        for (int i = 0; i < count; ++i) top = fmaxf(top, x(i));
        if (top == -infinity) return infinity;
        for (int i = 0; i < count; ++i) sum += times(exp((x(i) - top) / e), weights[i]);
        return -(top + e * ::logf(sum));
    }

    __device__ __forceinline__ std::int64_t of_rows(std::int64_t iteration = 0) const {
        return (iteration * p.count + problem) * n;
    }
    __device__ __forceinline__ std::int64_t of_columns(std::int64_t iteration = 0) const {
        return (iteration * p.count + problem) * m;
    }

    // -------------------------------------------------------------------------------------------------------- forward

    __device__ void solve(const SinkhornRun& run) {
        float *const best_f = row_1, *const best_g = column_1, *const t = column_2;
        const bool judged = p.tolerance >= 0;
        each_column([&](int j) { g[j] = p.g[of_columns() + j]; });
        float least = infinity, absorbed = 0;  // the smallest residual; the epsilon of K
        int iteration = 0, last = 0;
        bool stopped = false;
        for (bool ended = false; !ended; ++iteration) {
            const float e = epsilon(iteration), of_a = damping(p.rho_a, e), of_b = damping(p.rho_b, e);
            block_barrier<56>();
            const bool far = e != absorbed || *flag;
            if (far) absorb(e);
            absorbed = e;
            if (threadIdx.x == 0) *flag = 0;

            double off = 0;
            each_row([&](int i) {
                const float sum = row_sum(i, v);
                const bool live = a[i] > 0.0f, reached = !(sum <= 0.0f);
                f[i] = u[i] = 0.0f;
                if (live && reached) {
                    f[i] = of_a * (phi[i] - e * ::logf(sum));
                    u[i] = a[i] * exp(fminf((f[i] - phi[i]) / e, 80.0f));
                } else if (live) {
                    off += a[i];
                }
                if (run.history_f) run.history_f[of_rows(iteration) + i] = f[i];
            });
            block_barrier<58>();
            each_column([&](int j) {
                const float sum = column_sum(j, u), before = g[j];
                const bool direct = sum < smallest;
                t[j] = direct ? softmin_of_column(j, e) : gamma[j] - e * ::logf(sum);
                const bool live = b[j] > 0.0f && !(t[j] == infinity);
                g[j] = live ? of_b * t[j] : 0.0f;
                if (judged && b[j] > 0.0f) {
                    const float mass = direct ? b[j] * exp((before - t[j]) / e) : v[j] * sum;
                    off += fabsf(mass - optimal(b[j], before, p.rho_b));
                }
                v[j] = live ? b[j] * exp(fminf((g[j] - gamma[j]) / e, 80.0f)) : 0.0f;
                if (live && !(fabsf(g[j] - gamma[j]) <= furthest * e)) *flag = 1;
                if (run.history_g) run.history_g[of_columns(iteration) + j] = g[j];
            });
            ended = iteration + 1 == p.limit;
            bool better = ended;
            if (judged) {
                const double found = total(off);
                const float residual = found != found ? infinity : static_cast<float>(found);
                better = residual <= least || iteration <= p.annealed_count;
                if (better) least = residual;
                stopped = iteration >= p.annealed_count && residual <= p.tolerance;
                ended = ended || stopped;
            }
            if (better) {
                last = iteration;
                each_row([&](int i) { best_f[i] = f[i]; });
                each_column([&](int j) {
                    best_g[j] = g[j];
                    run.reached[of_columns() + j] = !(t[j] == infinity);
                });
            }
        }
        // The plan's row sums: its columns hold b e^(-g / rho) each, shared out by a_i e^((f_i + t_j - C_ij) / epsilon).
        const float of_b = damping(p.rho_b, p.epsilon);
        each_row([&](int i) {
            f[i] = phi[i] = best_f[i];
            run.f[of_rows() + i] = f[i];
        });
        each_column([&](int j) {
            gamma[j] = best_g[j] / of_b;
            v[j] = run.reached[of_columns() + j] ? optimal(b[j], best_g[j], p.rho_b) : 0.0f;
            run.g[of_columns() + j] = best_g[j];
        });
        block_barrier<60>();
        form(p.epsilon);
        block_barrier<61>();
        each_row([&](int i) {
            float found = 0;
            for (int j = 0; j < m; ++j) found = fmaf(fminf(a[i] * k[i * stride + j], 1.0f), v[j], found);
            run.rows[of_rows() + i] = found;
        });
        if (threadIdx.x == 0) {
            run.iterations[problem] = iteration;
            run.stopped[problem] = stopped;
            if (run.last) run.last[problem] = last;
        }
    }

    // ------------------------------------------------------------------------------------------------------- backward

    // What is collected so far goes to the cost's gradient.
    __device__ void flush(const SinkhornRunBackward& run) {
        block_barrier<62>();
        if (run.of_cost)
            each_entry([&](int i, int j) {
                run.of_cost[of_rows() * m + i * m + j] += times(d[i * stride + j], k[i * stride + j]);
                d[i * stride + j] = 0;
            });
    }

    // Whether all went well; `careful`: K is formed for every half-iteration, so that its sums are 1.
    __device__ bool differentiate(const SinkhornRunBackward& run, bool careful) {
        float *const of_f = row_1, *const of_log_a = row_2, *const by_row = row_3;
        float *const of_g = column_1, *const of_log_b = column_2, *const by_column = column_3;
        const int last = run.last[problem];
        block_barrier<64>();
        if (threadIdx.x == 0) *flag = 0;
        each_row([&](int i) {
            of_f[i] = run.of_f[of_rows() + i];
            of_log_a[i] = 0;
        });
        each_column([&](int j) {
            of_g[j] = run.of_g[of_columns() + j];
            of_log_b[j] = 0;
        });
        if (run.of_cost)
            each_entry([&](int i, int j) {
                run.of_cost[of_rows() * m + i * m + j] = 0;
                d[i * stride + j] = k[i * stride + j] = 0;
            });
        float absorbed = 0;
        for (int iteration = last; iteration >= 0; --iteration) {
            const float e = epsilon(iteration), of_a = damping(p.rho_a, e), of_b = damping(p.rho_b, e);

            // t from f
            each_row([&](int i) { f[i] = run.history_f[of_rows(iteration) + i]; });
            each_column([&](int j) { v[j] = run.history_g[of_columns(iteration) + j] / of_b; });
            bool far = careful || e != absorbed;
            if (!far) far = moved(v, e);
            if (far) {
                flush(run);
                each_row([&](int i) { phi[i] = f[i]; });
                each_column([&](int j) { gamma[j] = v[j]; });
                if (careful) each_column([&](int j) { gamma[j] = reference(softmin_of_column(j, e)); });
                block_barrier<65>();
                form(e);
            }
            absorbed = e;
            each_row([&](int i) { u[i] = a[i] * exp(fminf((f[i] - phi[i]) / e, 80.0f)); });
            block_barrier<66>();
            each_column([&](int j) {
                const float sum = column_sum(j, u), slope = b[j] > 0.0f ? of_b * of_g[j] : 0.0f;
                by_column[j] = share(slope, sum);
                if (run.of_cost && by_column[j] != 0.0f)
                    for (int i = 0; i < n; ++i) d[i * stride + j] = fmaf(u[i], by_column[j], d[i * stride + j]);
            });
            block_barrier<67>();
            each_row([&](int i) {
                const float y = u[i] * row_sum(i, by_column);
                of_f[i] -= y;
                of_log_a[i] = fmaf(-e, y, of_log_a[i]);
            });

            // s from the g before
            each_column([&](int j) {
                g[j] = iteration ? run.history_g[of_columns(iteration - 1) + j] : p.g[of_columns() + j];
            });
            if (careful || moved(g, e)) {
                flush(run);
                each_column([&](int j) { gamma[j] = g[j]; });
                if (careful) each_row([&](int i) { phi[i] = reference(softmin_of_row(i, e)); });
                block_barrier<69>();
                form(e);
            }
            each_column([&](int j) { v[j] = b[j] * exp(fminf((g[j] - gamma[j]) / e, 80.0f)); });
            block_barrier<70>();
            each_row([&](int i) {
                const float sum = row_sum(i, v), slope = a[i] > 0.0f ? of_a * of_f[i] : 0.0f;
                by_row[i] = share(slope, sum);
                of_f[i] = 0;
            });
            block_barrier<71>();
            each_column([&](int j) {
                float z = 0;
                for (int i = 0; i < n; ++i) {
                    const float mine = by_row[i];
                    z = fmaf(k[i * stride + j], mine, z);
                    if (run.of_cost) d[i * stride + j] = fmaf(mine, v[j], d[i * stride + j]);
                }
                z *= v[j];
                of_g[j] = -z;
                of_log_b[j] = fmaf(-e, z, of_log_b[j]);
            });
            if (!careful && *flag) return false;
        }
        flush(run);
        each_row([&](int i) { run.of_a[of_rows() + i] = a[i] > 0.0f ? of_log_a[i] / a[i] : 0.0f; });
        each_column([&](int j) { run.of_b[of_columns() + j] = b[j] > 0.0f ? of_log_b[j] / b[j] : 0.0f; });
        return true;
    }

    // A cotangent over the sum that its row or column is divided by; 0 where that is empty.
    __device__ __forceinline__ float share(float slope, float sum) {
        if (slope == 0.0f) return 0.0f;
        if (!(sum >= smallest && sum <= 1.0f / smallest)) *flag = 1;
        return sum == 0.0f ? 0.0f : slope / sum;
    }
    static __device__ __forceinline__ float reference(float softmin) { return softmin < infinity ? softmin : 0.0f; }

    // Whether f or these potentials of columns are far from what K holds.
    __device__ bool moved(const float* columns, float e) {
        if (threadIdx.x == 0) flag[1] = 0;
        block_barrier<73>();
        each_row([&](int i) {
            if (a[i] > 0.0f && !(fabsf(f[i] - phi[i]) <= furthest * e)) flag[1] = 1;
        });
        each_column([&](int j) {
            if (b[j] > 0.0f && !(fabsf(columns[j] - gamma[j]) <= furthest * e)) flag[1] = 1;
        });
        block_barrier<74>();
        const bool found = flag[1];
        return found;
    }
};

__global__ void __launch_bounds__(most_block, 4) run_kernel(const __grid_constant__ Forward given) {
    LL_DYN_SMEM(unsigned char, memory);
    Solver(given.problems, blockIdx.x, memory).solve(given.run);
}

__global__ void __launch_bounds__(most_block, 4) backward_kernel(const __grid_constant__ Backward given) {
    LL_DYN_SMEM(unsigned char, memory);
    Solver solver(given.problems, blockIdx.x, memory);
    if (!solver.differentiate(given.run, false)) solver.differentiate(given.run, true);
}

template <class Given>
cudaError_t launch(const Given& given, void (*kernel)(Given), bool back, int number, void* stream) {
    const SinkhornProblems& p = given.problems;
    if (p.count == 0) return cudaSuccess;
    const OnDevice current(number);
    if (current.error()) return current.error();
    const int shared = Solver::bytes(p.n, p.m, back);
    if (shared > 48 << 10) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
    }
    const int most = p.n > p.m ? p.n : p.m, rounded = (most + warp_size - 1) / warp_size * warp_size;
    const Launch launch(p.count, rounded < most_block ? rounded : most_block, shared, stream);
    return LL_LAUNCH(&launch.config, kernel, given);
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_sinkhorn_fits(int n, int m, int device) {
    return n <= most_size && m <= most_size && Solver::bytes(n, m, true) <= Device(device).shared_per_block;
}

extern "C" int logitless_cuda_sinkhorn_run(const SinkhornProblems* problems, const SinkhornRun* run, int device,
                                           void* stream) {
    return launch(Forward{*problems, *run}, run_kernel, false, device, stream);
}

extern "C" int logitless_cuda_sinkhorn_run_backward(const SinkhornProblems* problems, const SinkhornRunBackward* run,
                                                    int device, void* stream) {
    return launch(Backward{*problems, *run}, backward_kernel, true, device, stream);
}
