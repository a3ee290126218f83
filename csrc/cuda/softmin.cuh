// What makes a softmin: running maxima and sums, and 32 rows at a time where those are adjacent in memory.

#pragma once

#include "launch.cuh"

namespace logitless::cuda {
namespace {

// sum e^((x - top) / epsilon) so far; in units of epsilon.
struct Partial {
    float top = -infinity, total = 0;

    template <int ahead>
    __device__ __forceinline__ void add(const float (&x)[ahead]) {
        float above = x[0];
#pragma unroll
        for (int k = 1; k < ahead; ++k) above = fmaxf(above, x[k]);
        if (above > top) {
            total *= exp(top - above);
            top = above;
        }
#pragma unroll
        for (int k = 0; k < ahead; ++k) total += exp(x[k] - finite(top));
    }
    __device__ __forceinline__ void join(float other_top, float other_total) {
        const float above = fmaxf(top, other_top), origin = finite(above);
        total = total * exp(top - origin) + other_total * exp(other_top - origin);
        top = above;
    }
    // +inf for an empty sum. A maximum drops a NaN; the sum has kept it.
    __device__ __forceinline__ float softmin(float epsilon) const {
        return total == 0.0f ? infinity : -epsilon * (finite(top) + ::logf(total));
    }
};

// Of 32 adjacent rows, a lane's own, found by a block of `warps` warps for the first of them: x_j = (c_j - cost_j) /
// epsilon, j from begin to end, `ahead` of a thread loaded before the first is used. `shared` has a place per thread;
// where a lane has no row, `mine` is false.
template <int warps, int ahead>
__device__ __forceinline__ Partial adjacent_rows(const float* cost, std::int64_t stride, const float* c, int begin,
                                                 int end, float inverse, bool mine, Partial* shared) {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    Partial found;
    if (mine)
        for (int start = begin + warp; start < end; start += ahead * warps) {
            float x[ahead];
#pragma unroll
            for (int k = 0; k < ahead; ++k) {
                const int j = start + k * warps;
                x[k] = j < end ? (c[j] - cost[j * stride]) * inverse : -infinity;
            }
            found.add(x);
        }
    shared[threadIdx.x] = found;
    block_barrier<91>();
    if (warp == 0 && mine)
        for (int w = 1; w < warps; ++w) {
            const Partial& other = shared[w * warp_size + lane];
            found.join(other.top, other.total);
        }
    return found;
}

}  // namespace
}  // namespace logitless::cuda
