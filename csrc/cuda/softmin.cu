// A half-iteration on a stored cost:  s_i = -epsilon log sum_j e^((c_j - C_ij) / epsilon),  [B, n] of C [B, n, m].
//
// The cost is read once: at 3.0 TB/s, n = m = 16384: 0.36 ms, and one exponential an element, which the device's special
// function units do in 0.07 ms. Either the columns or the rows of C are adjacent in memory. Adjacent columns: a warp's
// lanes go along a row; adjacent rows: each lane has a row of its own. Every thread has a maximum and a sum so far.
// Where there are few rows they are cut into parts, and a second launch joins those.

#include "sinkhorn.h"
#include "softmin.cuh"

namespace logitless::cuda {
namespace {

constexpr int block_size = 256;
constexpr int warps = block_size / warp_size;
constexpr int ahead = 4;  // elements of a thread that are loaded before the first is used

__device__ __forceinline__ void put(const SoftMin& call, std::int64_t row, int part, const Partial& found) {
    if (call.parts == 1) {
        call.s[row] = found.softmin(call.epsilon);
    } else {
        float* const to = call.partials + 2 * (part * static_cast<std::int64_t>(call.count) * call.n + row);
        to[0] = found.top;
        to[1] = found.total;
    }
}

// A block per row (or part of one): adjacent columns.
__global__ void __launch_bounds__(block_size) rows_kernel(const __grid_constant__ SoftMin call) {
    LL_DYN_SMEM(Partial, shared);
    const float inverse = 1.0f / call.epsilon;
    const int part = static_cast<int>(blockIdx.x % call.parts);
    const std::int64_t row = blockIdx.x / call.parts, problem = row / call.n, i = row % call.n;
    const float* const cost = call.cost + problem * call.strides[0] + i * call.strides[1];
    const float* const c = call.c + problem * call.m;
    const int width = (call.m + call.parts - 1) / call.parts, begin = part * width, end = ::min(begin + width, call.m);
    Partial found;
    for (int start = begin + static_cast<int>(threadIdx.x); start < end; start += ahead * block_size) {
        float x[ahead];
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
            const int j = start + k * block_size;
            x[k] = j < end ? (c[j] - cost[j]) * inverse : -infinity;
        }
        found.add(x);
    }
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2)
        found.join(__shfl_xor_sync(~0u, found.top, distance), __shfl_xor_sync(~0u, found.total, distance));
    if (threadIdx.x % warp_size == 0) shared[threadIdx.x / warp_size] = found;
    block_barrier<90>();
    if (threadIdx.x == 0) {
        for (int w = 1; w < warps; ++w) found.join(shared[w].top, shared[w].total);
        put(call, row, part, found);
    }
}

// A block per 32 rows (or part of their columns): adjacent rows.
__global__ void __launch_bounds__(block_size) columns_kernel(const __grid_constant__ SoftMin call) {
    LL_DYN_SMEM(Partial, shared);
    const float inverse = 1.0f / call.epsilon;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const int tiles = (call.n + warp_size - 1) / warp_size;
    const int part = static_cast<int>(blockIdx.x % call.parts);
    const std::int64_t tile = blockIdx.x / call.parts, problem = tile / tiles;
    const std::int64_t i = tile % tiles * warp_size + lane;
    const float* const cost = call.cost + problem * call.strides[0] + i;
    const float* const c = call.c + problem * call.m;
    const int width = (call.m + call.parts - 1) / call.parts, begin = part * width, end = ::min(begin + width, call.m);
    const Partial found =
        adjacent_rows<warps, ahead>(cost, call.strides[2], c, begin, end, inverse, i < call.n, shared);
    if (warp == 0 && i < call.n) put(call, problem * call.n + i, part, found);
}

__global__ void __launch_bounds__(block_size) join_kernel(const __grid_constant__ SoftMin call) {
    const std::int64_t row = blockIdx.x * static_cast<std::int64_t>(block_size) + threadIdx.x;
    const std::int64_t rows = static_cast<std::int64_t>(call.count) * call.n;
    if (row >= rows) return;
    Partial found;
    for (int part = 0; part < call.parts; ++part) {
        const float* const from = call.partials + 2 * (part * rows + row);
        found.join(from[0], from[1]);
    }
    call.s[row] = found.softmin(call.epsilon);
}

bool along_rows(const SoftMin& call) { return call.strides[2] == 1; }

// Of the first launch, but for parts.
std::int64_t blocks(const SoftMin& call) {
    return static_cast<std::int64_t>(call.count) *
           (along_rows(call) ? call.n : (call.n + warp_size - 1) / warp_size);
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_softmin_parts(const SoftMin* call, int device) {
    if (!blocks(*call)) return 1;
    const std::int64_t least = ahead * (along_rows(*call) ? block_size : warps);  // columns of a part
    const std::int64_t wanted = 4 * Device(device).processors / blocks(*call), most = call->m / least;
    const std::int64_t parts = wanted < most ? wanted : most;
    return parts > 1 ? static_cast<int>(parts) : 1;
}

extern "C" int logitless_cuda_softmin(const SoftMin* call, int device, void* stream) {
    if (!blocks(*call)) return cudaSuccess;
    const OnDevice current(device);
    if (current.error()) return current.error();
    const bool rows = along_rows(*call);
    const Launch launch(static_cast<unsigned>(blocks(*call) * call->parts), block_size,
                        sizeof(Partial) * (rows ? warps : block_size), stream);
    const cudaError_t error = LL_LAUNCH(&launch.config, (rows ? rows_kernel : columns_kernel), *call);
    if (error != cudaSuccess || call->parts == 1) return error;
    const std::int64_t joined = (static_cast<std::int64_t>(call->count) * call->n + block_size - 1) / block_size;
    const Launch second(static_cast<unsigned>(joined), block_size, 0, stream);
    return LL_LAUNCH(&second.config, join_kernel, *call);
}
