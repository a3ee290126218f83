// The L1 distance between softmaxes, without the softmaxes in memory.
//
//   forward    C_ij = sum_v |p_iv - q_jv|, and D_ij = sum_v p_iv sign(p_iv - q_jv)      [problems, n, m]
//   backward   dz_iv = ds_iv/dz_iv p_iv (sum_j G_ij sign(p_iv - q_jv) - sum_j G_ij D_ij)
//
// A block makes probabilities of up to 32 tokens of each side and some columns in shared memory, and forms all pairs
// of them from there: logits are read once per 32 tokens of the other side, and the gradient is written once. A pair
// and column costs 4 operations forward and 3 backward. n = m = 16, V = 32000: 4.1 MB read a pass, 1.4 us at 3.0 TB/s,
// and 8.2 M pairs, 1.2 us; both passes are bound by their launches.
//
// Forward, warps take 4 x 4 pairs each with a column per lane; what a block found in its columns is a part, and parts
// are added up afterwards, in order. Backward, a thread takes one column of 8 tokens.

#include "l1.h"

#include "launch.cuh"

namespace logitless::cuda {
namespace {

constexpr int most_tokens = 32;  // of a block, on each side
constexpr int block_size = 256;
constexpr int warps = block_size / warp_size;
constexpr int forward_columns = 256, backward_columns = 64;
constexpr int side = 4;  // pairs of a warp at a time: side x side
constexpr int own = most_tokens * backward_columns / block_size;  // tokens of a thread, backward

// Some tokens of one side of a problem.
struct Tokens {
    const Probabilities& from;
    std::int64_t first;  // row of the chunk
    int count;

    __device__ Tokens(const Probabilities& from, int problem, int tile)
        : from(from), first(static_cast<std::int64_t>(problem) * from.tokens + tile * most_tokens),
          count(::min(from.tokens - tile * most_tokens, most_tokens)) {}
};

__device__ __forceinline__ float read(const Chunk& chunk, std::int64_t at) {
    switch (chunk.type) {
        case Type::float32: return static_cast<const float*>(chunk.z)[at];
        case Type::bfloat16: return static_cast<float>(static_cast<const __nv_bfloat16*>(chunk.z)[at]);
        default: return static_cast<float>(static_cast<const __half*>(chunk.z)[at]);
    }
}

// phi(inner (z + bias)) of one logit; -inf below the floor.
__device__ __forceinline__ float inner(const Chunk& chunk, std::int64_t row, std::int64_t column) {
    float x = read(chunk, row * chunk.stride + column);
    if (chunk.bias) x += chunk.bias[column];
    if (chunk.floor && x < chunk.floor[row]) return -infinity;
    return chunk.capped ? tanh(chunk.inner * x) : x;
}

__device__ __forceinline__ float probability(const Probabilities& from, std::int64_t row, float x) {
    const float top = finite(static_cast<float>(from.max[row]));
    return exp(from.chunk.outer[row] * x - top) * static_cast<float>(1 / from.sum[row]);
}

// to[i * stride + c]: the probability of token i in column begin + c; 0 where there is no such token or column.
__device__ void fill(const Tokens& tokens, std::int64_t begin, int width, std::int64_t columns, float* to,
                     int stride) {
    for (int e = threadIdx.x; e < most_tokens * width; e += blockDim.x) {
        const int i = e / width, c = e % width;
        const std::int64_t row = tokens.first + i;
        to[i * stride + c] = i < tokens.count && begin + c < columns
                                 ? probability(tokens.from, row, inner(tokens.from.chunk, row, begin + c))
                                 : 0.0f;
    }
}

struct Tiles {
    int p, q;

    static __host__ __device__ int of(int tokens) { return (tokens + most_tokens - 1) / most_tokens; }
    __host__ __device__ explicit Tiles(const L1& call) : p(of(call.p.tokens)), q(of(call.q.tokens)) {}
    __host__ __device__ std::int64_t count(const L1& call) const {
        return static_cast<std::int64_t>(call.problems) * p * q;
    }
};

// ------------------------------------------------------------------------------------------------------------ forward

constexpr int forward_stride = forward_columns;
constexpr int pairs = most_tokens * most_tokens;

__global__ void __launch_bounds__(block_size, 2) cost_kernel(const __grid_constant__ L1 call) {
    LL_DYN_SMEM(double, memory);
    double *const cost = memory, *const moments = cost + pairs;  // [most_tokens, most_tokens]
    float *const p = reinterpret_cast<float*>(moments + pairs), *const q = p + most_tokens * forward_stride;
    const Tiles tiles(call);
    const int part = static_cast<int>(blockIdx.x) % call.parts;
    const int tile = static_cast<int>(blockIdx.x) / call.parts;
    const int problem = tile / (tiles.p * tiles.q), pair_of_tiles = tile % (tiles.p * tiles.q);
    const Tokens of_p(call.p, problem, pair_of_tiles / tiles.q), of_q(call.q, problem, pair_of_tiles % tiles.q);
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const int groups_p = (of_p.count + side - 1) / side, groups_q = (of_q.count + side - 1) / side;

    for (int e = threadIdx.x; e < 2 * pairs; e += block_size) cost[e] = 0;
    const std::int64_t step = static_cast<std::int64_t>(call.parts) * forward_columns;
    for (std::int64_t begin = static_cast<std::int64_t>(part) * forward_columns; begin < call.columns; begin += step) {
        fill(of_p, begin, forward_columns, call.columns, p, forward_stride);
        fill(of_q, begin, forward_columns, call.columns, q, forward_stride);
        block_barrier<80>();
        for (int group = warp; group < groups_p * groups_q; group += warps) {
            const int i0 = group / groups_q * side, j0 = group % groups_q * side;
            float sums[2][side][side] = {};
#pragma unroll 2
            for (int c = lane; c < forward_columns; c += warp_size) {
                float x[side], y[side];
#pragma unroll
                for (int i = 0; i < side; ++i) {
                    x[i] = p[(i0 + i) * forward_stride + c];
                    y[i] = q[(j0 + i) * forward_stride + c];
                }
#pragma unroll
                for (int i = 0; i < side; ++i)
#pragma unroll
                    for (int j = 0; j < side; ++j) {
                        const float difference = x[i] - y[j];
                        sums[0][i][j] += fabsf(difference);
                        sums[1][i][j] += difference == 0.0f ? 0.0f : copysignf(x[i], difference);
                    }
            }
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int i = 0; i < side; ++i)
#pragma unroll
                    for (int j = 0; j < side; ++j) {
                        float x = sums[k][i][j];
#pragma unroll
                        for (int distance = warp_size / 2; distance > 0; distance /= 2)
                            x += __shfl_xor_sync(~0u, x, distance);
                        if (lane == 0) (k ? moments : cost)[(i0 + i) * most_tokens + j0 + j] += x;
                    }
        }
        block_barrier<81>();
    }
    const std::int64_t n = call.p.tokens, m = call.q.tokens;
    const std::int64_t base = (static_cast<std::int64_t>(part) * call.problems + problem) * n * m;
    for (int e = threadIdx.x; e < of_p.count * of_q.count; e += block_size) {
        const int i = e / of_q.count, j = e % of_q.count;
        const std::int64_t at = base + (pair_of_tiles / tiles.q * most_tokens + i) * m +
                                pair_of_tiles % tiles.q * most_tokens + j;
        call.cost[at] = cost[i * most_tokens + j];
        if (call.moments) call.moments[at] = moments[i * most_tokens + j];
    }
}

// ----------------------------------------------------------------------------------------------------------- backward

struct BackwardMemory {
    float p[most_tokens][backward_columns], x[most_tokens][backward_columns], q[most_tokens][backward_columns];
    float gradient[most_tokens][most_tokens];  // [j][i]
    double expected[most_tokens];
};

__global__ void __launch_bounds__(block_size, 4) gradient_kernel(const __grid_constant__ L1 call) {
    LL_DYN_SMEM(unsigned char, raw);
    BackwardMemory& memory = *reinterpret_cast<BackwardMemory*>(raw);
    const std::int64_t slices = (call.columns + backward_columns - 1) / backward_columns;
    const int tiles = Tiles(call).p;
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) % slices * backward_columns;
    const int problem = static_cast<int>(blockIdx.x / slices) / tiles, tile = static_cast<int>(blockIdx.x / slices) % tiles;
    const Tokens of_p(call.p, problem, tile);
    const int c = threadIdx.x % backward_columns, i0 = threadIdx.x / backward_columns * own;
    const std::int64_t token = static_cast<std::int64_t>(tile) * most_tokens;  // the first, in its problem

    for (int e = threadIdx.x; e < most_tokens * backward_columns; e += block_size) {
        const int i = e / backward_columns, v = e % backward_columns;
        const std::int64_t row = of_p.first + i;
        const bool there = i < of_p.count && begin + v < call.columns;
        memory.x[i][v] = there ? inner(call.p.chunk, row, begin + v) : 0.0f;
        memory.p[i][v] = there ? probability(call.p, row, memory.x[i][v]) : 0.0f;
    }
    if (threadIdx.x < most_tokens) {
        double sum = 0;
        const auto at = [&](const std::int64_t(&strides)[3], int j) {
            return problem * strides[0] + (token + threadIdx.x) * strides[1] + j * strides[2];
        };
        if (static_cast<int>(threadIdx.x) < of_p.count)
            for (int j = 0; j < call.q.tokens; ++j)
                sum += call.gradient[at(call.gradient_strides, j)] * call.given[at(call.given_strides, j)];
        memory.expected[threadIdx.x] = sum;
    }
    float sums[own] = {};
    for (int t = 0; t < Tiles::of(call.q.tokens); ++t) {
        const Tokens of_q(call.q, problem, t);
        fill(of_q, begin, backward_columns, call.columns, &memory.q[0][0], backward_columns);
        for (int e = threadIdx.x; e < most_tokens * most_tokens; e += block_size) {
            const int i = e / most_tokens, j = e % most_tokens;
            const std::int64_t at = problem * call.gradient_strides[0] + (token + i) * call.gradient_strides[1] +
                                    (t * most_tokens + j) * call.gradient_strides[2];
            memory.gradient[j][i] = i < of_p.count && j < of_q.count ? call.gradient[at] : 0.0f;
        }
        block_barrier<83>();
        float x[own];
#pragma unroll
        for (int i = 0; i < own; ++i) x[i] = memory.p[i0 + i][c];
#pragma unroll 2
        for (int j = 0; j < of_q.count; ++j) {
            const float y = memory.q[j][c];
#pragma unroll
            for (int i = 0; i < own; ++i) {
                const float g = memory.gradient[j][i0 + i];
                sums[i] += x[i] > y ? g : x[i] < y ? -g : 0.0f;
            }
        }
        block_barrier<84>();
    }
    if (begin + c >= call.columns) return;
#pragma unroll
    for (int i = 0; i < own; ++i) {
        if (i0 + i >= of_p.count) break;
        const std::int64_t row = of_p.first + i0 + i;
        const float z = memory.x[i0 + i][c], outer = call.p.chunk.outer[row];
        const float capped = z == -infinity ? 0.0f : fma(-z, z, 1.0f);
        const float slope = call.p.chunk.capped ? outer * call.p.chunk.inner * capped : outer;
        const float bar = sums[i] - static_cast<float>(memory.expected[i0 + i]);
        call.out[row * call.out_stride + begin + c] = slope * (memory.p[i0 + i][c] * bar);
    }
}

cudaError_t launch(const L1& call, void (*kernel)(L1), std::int64_t blocks, std::size_t shared, void* stream) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    const Launch launch(static_cast<unsigned>(blocks), block_size, shared, stream);
    return LL_LAUNCH(&launch.config, kernel, call);
}

bool empty(const L1& call) { return !call.problems || !call.p.tokens || !call.q.tokens || !call.columns; }

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_l1_parts(const L1* call, int device) {
    if (empty(*call)) return 1;
    const std::int64_t most = (call->columns + forward_columns - 1) / forward_columns;
    const std::int64_t tiles = Tiles(*call).count(*call);
    const std::int64_t wanted = (2 * Device(device).processors + tiles - 1) / tiles;
    return static_cast<int>(wanted < most ? wanted : most);
}

extern "C" int logitless_cuda_l1(const L1* call, int device, void* stream) {
    if (empty(*call)) return cudaSuccess;
    const OnDevice current(device);
    if (current.error()) return current.error();
    constexpr std::size_t shared = sizeof(double) * 2 * pairs + sizeof(float) * 2 * most_tokens * forward_stride;
    return launch(*call, cost_kernel, Tiles(*call).count(*call) * call->parts, shared, stream);
}

extern "C" int logitless_cuda_l1_backward(const L1* call, int device, void* stream) {
    if (empty(*call)) return cudaSuccess;
    const OnDevice current(device);
    if (current.error()) return current.error();
    const std::int64_t slices = (call->columns + backward_columns - 1) / backward_columns;
    return launch(*call, gradient_kernel, slices * Tiles(*call).p * call->problems, sizeof(BackwardMemory), stream);
}
