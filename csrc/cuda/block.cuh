// What the row kernels are made of: rows as 16-byte quads, reductions over a block or a cluster, the closing of a row.
//
// A row is cut where addresses that a vector of four elements needs cut it (16 bytes of float32), so that every access
// to the middle of a row is one aligned vector; only the first and the last quad can hold places that are no columns.
// What else has one value per column (the teacher, a bias, weights, the output) is accessed in the student's quads: as
// vectors where it is aligned alike, else one by one.

#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rows.h"

// What a CPU build of these sources (tests/cuda_host) states in its own way.
#ifndef LL_LAUNCH
#define LL_LAUNCH(config, kernel, call) cudaLaunchKernelEx(config, kernel, call)
#define LL_DYN_SMEM(T, name) extern __shared__ __align__(16) T name[]
#endif

// A test leaves out the barrier of this number, and must notice.
#ifndef LL_TEST_DROP_BARRIER
#define LL_TEST_DROP_BARRIER 0
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LL_CLUSTERS 1
#endif

namespace logitless::cuda {
namespace {

// Two blocks share a processor and its 65536 registers: 80 for each of 2 x 384 threads, and for what works on pairs of
// rows, and so inlines every divergence, 128 for each of 2 x 256.
constexpr int most_threads = 384;
constexpr int most_threads_for(bool paired) { return paired ? 256 : most_threads; }
constexpr int warp_size = 32;
constexpr float infinity = __builtin_inff();

// --------------------------------------------------------------------------------------------------------------- quads

struct Quad {
    float at[4];
};

__device__ __forceinline__ float sum(const Quad& x) { return (x.at[0] + x.at[1]) + (x.at[2] + x.at[3]); }

__device__ __forceinline__ float largest(const Quad& x) {
    return fmaxf(fmaxf(x.at[0], x.at[1]), fmaxf(x.at[2], x.at[3]));
}

template <class Function>
__device__ __forceinline__ Quad each(const Function& function) {
    Quad out;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.at[k] = function(k);
    return out;
}

template <int bytes>
__device__ __forceinline__ bool aligned(const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

__device__ __forceinline__ Quad get(const float4& from) { return {{from.x, from.y, from.z, from.w}}; }
__device__ __forceinline__ float4 pack(const Quad& x) { return make_float4(x.at[0], x.at[1], x.at[2], x.at[3]); }

template <class T>
__device__ __forceinline__ T rounded(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
    else return __float2bfloat16_rn(x);
}

// Of a rounded number.
template <class T>
__device__ __forceinline__ unsigned bits(float x) {
    if constexpr (std::is_same_v<T, __half>) return __half_as_ushort(rounded<T>(x));
    else return __bfloat16_as_ushort(rounded<T>(x));
}

__device__ __forceinline__ int size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// The columns of a row, in quads. Column j is place k of quad v, j = 4 v - lead + k.
struct Span {
    int columns, lead;

    __device__ Span(const char* row, Type type, std::int64_t columns)
        : columns(static_cast<int>(columns)),
          lead(static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / size_of(type) % 4)) {}

    __device__ __forceinline__ int quads() const { return (lead + columns + 3) / 4; }
    __device__ __forceinline__ int column(int v) const { return 4 * v - lead; }
    __device__ __forceinline__ bool whole(int v) const { return column(v) >= 0 && column(v) + 4 <= columns; }
    __device__ __forceinline__ bool holds(int v, int k) const {
        return static_cast<unsigned>(column(v) + k) < static_cast<unsigned>(columns);
    }

    // Of one value per column; 0 where there is none.
    template <class T>
    __device__ __forceinline__ Quad read(const T* from, int v) const {
        using Bits = std::conditional_t<sizeof(T) == sizeof(float), uint4, uint2>;
        from += column(v);
        if (whole(v) && aligned<sizeof(Bits)>(from)) {
            const Bits bits = *reinterpret_cast<const Bits*>(from);
            T values[4];
            std::memcpy(static_cast<void*>(values), &bits, sizeof bits);
            return each([&](int k) { return static_cast<float>(values[k]); });
        }
        return each([&](int k) { return holds(v, k) ? static_cast<float>(from[k]) : 0.0f; });
    }

    __device__ __forceinline__ Quad read(const char* from, Type type, int v) const {
        switch (type) {
            case Type::float32: return read(reinterpret_cast<const float*>(from), v);
            case Type::bfloat16: return read(reinterpret_cast<const __nv_bfloat16*>(from), v);
            default: return read(reinterpret_cast<const __half*>(from), v);
        }
    }

    // The whole quad's store is an intrinsic: a plain one nvcc takes apart, to share it with those of the ragged quads.
    template <class T>
    __device__ __forceinline__ void write(T* to, int v, const Quad& values) const {
        to += column(v);
        if (whole(v) && aligned<4 * sizeof(T)>(to)) {
            if constexpr (sizeof(T) == sizeof(float)) {
                __stwb(reinterpret_cast<float4*>(to), pack(values));
            } else {
                const auto two = [&](int k) { return bits<T>(values.at[k]) | bits<T>(values.at[k + 1]) << 16; };
                __stwb(reinterpret_cast<uint2*>(to), make_uint2(two(0), two(2)));
            }
            return;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (holds(v, k)) to[k] = rounded<T>(values.at[k]);
    }
};

// One row of a chunk. x = phi(inner (z + bias)), or -inf below the floor, s = outer x. What all rows share stays in the
// launch's constants.
struct Side {
    const Chunk& chunk;
    std::int64_t row;
    float outer;

    __device__ Side(const Chunk& chunk, std::int64_t row) : chunk(chunk), row(row), outer(chunk.outer[row]) {}

    __device__ __forceinline__ const char* z() const {
        return static_cast<const char*>(chunk.z) + row * chunk.stride * size_of(chunk.type);
    }
    __device__ __forceinline__ Span span(std::int64_t columns) const { return {z(), chunk.type, columns}; }
    __device__ __forceinline__ Quad read(const Span& span, int v) const { return span.read(z(), chunk.type, v); }

    __device__ __forceinline__ bool plain() const { return !chunk.bias && !chunk.capped && !chunk.floor; }  // x = z
    __device__ __forceinline__ Quad phi(const Span& span, int v, Quad z) const {
        if (chunk.bias) {
            const Quad b = span.read(chunk.bias, v);
            z = each([&](int k) { return z.at[k] + b.at[k]; });
        }
        unsigned below = 0;
        if (chunk.floor) {
            const float floor = chunk.floor[row];
#pragma unroll
            for (int k = 0; k < 4; ++k) below |= static_cast<unsigned>(z.at[k] < floor) << k;
        }
        if (chunk.capped) z = each([&](int k) { return tanh(chunk.inner * z.at[k]); });
        if (chunk.floor) z = each([&](int k) { return below >> k & 1 ? -infinity : z.at[k]; });
        return z;
    }

    // -inf where there is no column.
    __device__ __forceinline__ Quad scaled(const Span& span, int v, const Quad& x) const {
        Quad s = each([&](int k) { return outer * x.at[k]; });
        if (!span.whole(v)) s = each([&](int k) { return span.holds(v, k) ? s.at[k] : -infinity; });
        return s;
    }

    // ds/dz times g
    __device__ __forceinline__ float pull(float x, float g) const {
        if (chunk.floor && x == -infinity) return 0.0f;
        return chunk.capped ? outer * chunk.inner * fma(-x, x, 1.0f) * g : outer * g;
    }
};

__device__ __forceinline__ float finite(float maximum) { return maximum == -infinity ? 0.0f : maximum; }
__device__ __forceinline__ double finite(double maximum) { return maximum == -infinity ? 0.0 : maximum; }

// ----------------------------------------------------------------------------------------------- accumulators of a row

// Sums over a row, in the order in which they are reduced.
enum Sum { total, target, first, square, weighted, mass, teacher_total, forward, reverse, sums };

struct Accumulators {
    double max, teacher_max;
    double sum[sums];
    std::int64_t argmax;

    __device__ void clear() {
        max = teacher_max = -infinity;
        for (double& s : sum) s = 0;
        argmax = 0;
    }

    // The sums so far, seen from new maxima: differences to one shrink by `shift`, exponentials of them by `factor`.
    __device__ void raise(double to, double teacher_to) {
        if (to > max) {
            const double shift = finite(max) - finite(to), factor = max == -infinity ? 1 : ::exp(shift);
            sum[first] = scale(factor, sum[first] + shift * sum[total]);
            sum[square] = scale(factor * factor, sum[square]);
            sum[weighted] += shift * sum[mass];
            sum[forward] -= shift * sum[teacher_total];
            sum[reverse] = scale(factor, sum[reverse] - shift * sum[total]);
            sum[total] = scale(factor, sum[total]);
            max = to;
        }
        if (teacher_to > teacher_max) {
            const double shift = finite(teacher_max) - finite(teacher_to);
            const double factor = teacher_max == -infinity ? 1 : ::exp(shift);
            sum[forward] = scale(factor, sum[forward] + shift * sum[teacher_total]);
            sum[reverse] += shift * sum[total];
            sum[teacher_total] = scale(factor, sum[teacher_total]);
            teacher_max = teacher_to;
        }
    }
    static __device__ double scale(double factor, double x) { return factor == 0 ? 0 : factor * x; }

    // A maximum drops a NaN; the sum has kept it.
    __device__ void keep_nan() {
        if (sum[total] != sum[total]) max = sum[total];
        if (sum[teacher_total] != sum[teacher_total]) teacher_max = sum[teacher_total];
    }

    __device__ void put(const Call& call, std::int64_t row) const {
        const Statistics& to = call.statistics;
        const auto put = [row](double* to, double value) {
            if (to) to[row] = value;
        };
        put(to.max, max);
        put(to.sum, sum[total]);
        put(to.target, sum[target]);
        put(to.first, sum[first]);
        put(to.square, sum[square]);
        put(to.weighted, sum[weighted]);
        put(to.mass, sum[mass]);
        put(to.teacher_max, teacher_max);
        put(to.teacher_sum, sum[teacher_total]);
        put(to.forward, sum[forward]);
        put(to.reverse, sum[reverse]);
        if (to.argmax) to.argmax[row] = argmax;
    }

    __device__ void get(const Call& call, std::int64_t row) {
        const Statistics& from = call.statistics;
        const auto get = [row](const double* from) { return from ? from[row] : 0.0; };
        max = get(from.max);
        sum[total] = get(from.sum);
        sum[first] = get(from.first);
        sum[square] = get(from.square);
        sum[mass] = get(from.mass);
        teacher_max = get(from.teacher_max);
        sum[teacher_total] = get(from.teacher_sum);
        sum[reverse] = get(from.reverse);
    }
};

// ------------------------------------------------------------------------------- normalizers and coefficients of a row

struct Row {
    float max, log_sum, teacher_max, teacher_log_sum;
    float one_hot, q, p, weights, q_log_q, q_squared, q_log_ratio;
    bool has_q, live;

    // Everything but the normalizers; q before it gets its balance.
    __device__ void coefficients(const Combination& c, std::int64_t row) {
        const auto get = [row](const float* from) { return from ? from[row] : 0.0f; };
        one_hot = get(c.one_hot);
        q = get(c.q);
        p = get(c.p);
        weights = get(c.weights);
        q_log_q = get(c.q_log_q);
        q_squared = get(c.q_squared);
        q_log_ratio = get(c.q_log_ratio);
        has_q = c.q;
        live = !c.live || c.live[row];
    }

    __device__ void normalize(const Normalizers& n, std::int64_t row) {
        max = finite(n.max[row]);
        log_sum = n.log_sum[row];
        teacher_max = n.teacher_max ? finite(n.teacher_max[row]) : 0.0f;
        teacher_log_sum = n.teacher_max ? n.teacher_log_sum[row] : 0.0f;
    }

    __device__ void normalize(const Accumulators& a) {
        max = static_cast<float>(finite(a.max));
        log_sum = static_cast<float>(::log(a.sum[total]));
        teacher_max = static_cast<float>(finite(a.teacher_max));
        teacher_log_sum = static_cast<float>(::log(a.sum[teacher_total]));
    }

    // q gets its balance: minus each coefficient times the sum over the row of what it multiplies (`close` in
    // engine/statistics.py). `of_terms` is that of the generic divergences.
    __device__ void close(const Combination& c, const Accumulators& a, double of_terms, std::int64_t row) {
        const double log_sum = ::log(a.sum[total]);
        double closed = q - of_terms;
        if (c.q_lse) closed += c.q_lse[row] * (a.max + log_sum);
        if (c.one_hot) closed -= one_hot;
        if (c.p) closed -= p;
        if (c.weights) closed -= weights * a.sum[mass];
        if (c.q_log_q) closed -= q_log_q * (a.sum[first] / a.sum[total] - log_sum);
        if (c.q_squared) closed -= q_squared * (a.sum[square] / (a.sum[total] * a.sum[total]));
        if (c.q_log_ratio)
            closed -= q_log_ratio * (::log(a.sum[teacher_total]) - log_sum - a.sum[reverse] / a.sum[total]);
        q = static_cast<float>(closed);
        has_q = true;
    }

    __device__ __forceinline__ float log_q(float s) const { return (s - max) - log_sum; }
    __device__ __forceinline__ float log_p(float t) const { return (t - teacher_max) - teacher_log_sum; }
};

// What a gradient owes to the teacher, but for the terms.
__device__ __forceinline__ float of_teacher(const Combination& c, const Row& r, float log_p, float log_q) {
    float mixed = 0.0f;
    if (c.p) mixed += r.p * exp(log_p);  // rounded like r.q * q: the sum is exactly 0 where p = q
    if (c.q_log_ratio) mixed = fma(r.q_log_ratio, times(exp(log_q), log_q - log_p), mixed);
    return mixed;
}

// All that a gradient owes to the teacher: of_teacher and the terms, which are of `Functors`.
template <class Functors>
__device__ __forceinline__ Quad mix(const Combination& c, const Row& r, std::int64_t row, const Quad& s,
                                    const Quad& t) {
    Quad mixed = each([&](int k) { return of_teacher(c, r, r.log_p(t.at[k]), r.log_q(s.at[k])); });
    for (int i = 0; i < c.term_count; ++i)
        Functors::visit(c.terms[i].functor, {c.terms[i].parameters, row}, [&](auto functor) {
            const float coefficient = c.terms[i].coefficient[row];
            mixed = each([&](int k) {
                return fma(coefficient, functor.at(r.log_p(t.at[k]), r.log_q(s.at[k])).slope, mixed.at[k]);
            });
        });
    return mixed;
}

// The gradient of one quad; `x` is the student's, `target` a column, negative and far from all columns if there is
// none.
__device__ __forceinline__ Quad combine(const Combination& c, const Row& r, const Side& student, const Span& span,
                                        std::int64_t row, int target, int v, const Quad& x, const Quad& mixed) {
    const Quad s = student.scaled(span, v, x);
    Quad out = each([&](int k) {
        const float log_q = r.log_q(s.at[k]), q = exp(log_q);
        float all = r.has_q ? r.q * q : 0.0f;
        if (c.q_log_q) all = fma(r.q_log_q, times(q, log_q), all);
        if (c.q_squared) all = fma(r.q_squared, q * q, all);
        return all + mixed.at[k];
    });
    if (c.weights) {
        const Quad w = c.weight_vector ? span.read(c.weight_vector, v) : Quad{{1.0f, 1.0f, 1.0f, 1.0f}};
        out = each([&](int k) { return out.at[k] + r.weights * w.at[k]; });
    }
    if (c.rows) {
        const Quad given = span.read(c.rows + row * c.rows_stride, v);
        out = each([&](int k) { return out.at[k] + given.at[k]; });
    }
    return each([&](int k) {
        const float all = span.column(v) + k == target ? out.at[k] + r.one_hot : out.at[k];
        return student.pull(x.at[k], all);
    });
}

__device__ __forceinline__ int column_of(const std::int64_t* targets, std::int64_t row, int columns) {
    const std::int64_t y = targets ? targets[row] : -1;
    return y >= 0 && y < columns ? static_cast<int>(y) : -8;
}

// --------------------------------------------------------------------------------------------- barriers and reductions

template <int number>
__device__ __forceinline__ void block_barrier() {
    if (number != LL_TEST_DROP_BARRIER) __syncthreads();
}

// The blocks that share a row, each with a part of its quads.
struct Cluster {
    int rank = 0, size = 1;

#if LL_CLUSTERS
    __device__ Cluster()
        : rank(static_cast<int>(cooperative_groups::this_cluster().block_rank())),
          size(static_cast<int>(cooperative_groups::this_cluster().num_blocks())) {}

    template <int number>
    __device__ __forceinline__ void barrier() const {
        if (number != LL_TEST_DROP_BARRIER) cooperative_groups::this_cluster().sync();
    }
    template <class T>
    __device__ __forceinline__ const T* of(T* mine, int rank) const {
        return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
    }
#else
    __device__ Cluster() {}
    template <int number>
    __device__ __forceinline__ void barrier() const {}
    template <class T>
    __device__ __forceinline__ const T* of(T* mine, int) const {
        return mine;
    }
#endif
};

struct Exchange {
    double warps[sums][most_threads / warp_size];
    double block[2][sums];  // of this block; in turns, as others of the cluster may still be reading the last ones
    double total[sums];     // of the whole cluster
};

struct Add {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return a + b;
    }
};
struct Max {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
    static __device__ __forceinline__ double of(double a, double b) { return fmax(a, b); }
};
struct Min {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return b < a ? b : a;
    }
};

struct Reduction {
    Exchange& exchange;
    const Cluster& cluster;
    int turn = 0;

    // values[i] of all threads of the cluster, for the bits i of `wanted`, always in the same order; the first warp
    // finds them in exchange.total. Warps add in T, what they find is added in double.
    //
    // One barrier must stand between this and the next call: total and warps are written again.
    template <class Op, class T, int count>
    __device__ __forceinline__ void operator()(const T (&values)[count], unsigned wanted) {
        static_assert(count <= sums && count <= warp_size, "the first warp has a thread for each");
        const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            if (!(wanted >> i & 1)) continue;
            T value = values[i];
#pragma unroll
            for (int distance = warp_size / 2; distance > 0; distance /= 2)
                value = Op::of(value, __shfl_xor_sync(~0u, value, distance));
            if (lane == 0) exchange.warps[i][warp] = value;
        }
        block_barrier<1>();
        const int i = threadIdx.x;
        const bool mine = i < count && (wanted >> i & 1);
        double value = 0;
        if (mine) {
            value = exchange.warps[i][0];
            const int warps = blockDim.x / warp_size;
            for (int w = 1; w < warps; ++w) value = Op::of(value, exchange.warps[i][w]);
            exchange.block[turn][i] = value;
        }
        if (cluster.size > 1) {
            cluster.template barrier<2>();
            if (mine) {
                value = *cluster.of(&exchange.block[turn][i], 0);
                for (int r = 1; r < cluster.size; ++r) value = Op::of(value, *cluster.of(&exchange.block[turn][i], r));
            }
        }
        if (mine) exchange.total[i] = value;
        __syncwarp();
        turn ^= 1;
    }
};

}  // namespace
}  // namespace logitless::cuda
