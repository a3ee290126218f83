// A Sinkhorn iteration, rows and then columns, with one reading of a stored cost C [B, n, m]:
//
//   s_i = -epsilon log sum_j e^((c_j - C_ij) / epsilon)        f_i = damping s_i, 0 where not s_i < inf
//   t_j = -epsilon log sum_i e^((f_i + epsilon log a_i - C_ij) / epsilon)
//
// With top_i = max_j (c_j - C_ij), w_ij = e^((c_j - C_ij - top_i) / epsilon) and total_i = sum_j w_ij the columns need
// no exponentials of their own:
//
//   s_i = -(top_i + epsilon log total_i)        phi_i = log a_i + (f_i + top_i) / epsilon
//   t_j = c_j - epsilon log sum_i w_ij e^(phi_i)
//
// f is rounded before phi is formed: what comes out is a pair of potentials of which one is the other's. Sums over i
// are kept relative to the largest phi so far, so that no term is above 1.
//
// First launch: blocks stay, and rows go through shared memory in stages, all on the way but for the one in use. A team
// of warps has a row at a time, a thread the same 32 columns of every row: its c, its w and its sums over i are in
// registers. Where a row is too long for a block, the blocks of a cluster share it, and exchange maxima and totals
// through distributed shared memory. A thread reads what its own warp has loaded: barriers are for these exchanges.
// Second launch: the blocks' sums are joined. A column whose sum is so small that terms may have been lost below what
// float32 holds is read anew, in the log domain: no epsilon is too small. That happens while potentials are far from
// theirs, in the first iteration of a run, say.
//
// Memory: 4 n m bytes, and 8 m for the sums of each block, which L2 holds. At 3.35 TB/s, n = m = 16384: 321 us. A row
// of that length is 4530 cycles on the way to a processor of an H100, and some 790 instructions of each of 16 warps,
// 3200 cycles of issue: an exponential and 9 others per element, what copies it, and what a row needs.

#include <map>
#include <mutex>
#include <tuple>

#include "sinkhorn.h"
#include "softmin.cuh"

namespace logitless::cuda {
namespace {

constexpr int block_size = 512;
constexpr int warps = block_size / warp_size;
constexpr int most_groups = 8;  // quads of a thread: 32 columns
constexpr int most_stages = 8;
constexpr int most_cluster = 8;
constexpr float least = 1e-25f;  // of a column's sum, relative to the largest e^phi

// How rows are shared out.
struct Layout {
    int cluster = 1;  // blocks that share a row
    int share = 0;    // columns of a block, a multiple of 4
    int teams = 0;    // of a block
    int members = 0;  // warps of a team
    int groups = 0;   // quads of a thread
    int stages = 0;
    std::size_t shared = 0;
    int clusters = 0;  // that the device runs at the same time
};

struct Streamed {
    Iteration call;
    Layout layout;
    float inverse, scale;  // of epsilon, and for powers of two
};

struct Slots {
    float maxima[warps], totals[warps];  // of each warp; maxima at last of each team
};

// 2^x to 2 units in the last place; 0 below the smallest normal number.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return x < -126.0f ? 0.0f : ::exp2f(x);
#endif
}

// A block that shares its rows with none.
struct Alone {
    static constexpr int rank = 0, size = 1;

    template <int number>
    __device__ __forceinline__ void barrier() const {}
    template <class T>
    __device__ __forceinline__ const T* of(T* mine, int) const {
        return mine;
    }
};

struct Larger : Max {
    static constexpr float none = -infinity;
};
struct Plus : Add {
    static constexpr float none = 0;
};

template <class Op>
__device__ __forceinline__ float across_warp(float x) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// What a block's threads know of themselves.
template <class Blocks>
struct Place {
    const Iteration& call;
    const Layout& layout;
    Blocks cluster;
    int lane, warp, team, member;
    int problem, part;
    int first, width;  // columns of the block

    __device__ explicit Place(const Streamed& streamed)
        : call(streamed.call), layout(streamed.layout), lane(threadIdx.x % warp_size), warp(threadIdx.x / warp_size),
          team(warp / layout.members), member(warp % layout.members) {
        const int number = static_cast<int>(blockIdx.x) / cluster.size;
        problem = number / call.parts, part = number % call.parts;
        first = cluster.rank * layout.share, width = ::min(layout.share, call.m - first);
    }

    // The first column of the warp in a group, from the block's first; that of the next group is `step` further on.
    __device__ __forceinline__ int step() const { return 4 * warp_size * layout.members; }
    __device__ __forceinline__ int column(int group) const { return group * step() + 4 * warp_size * member; }

    // The row of the team in a round; warps that are left over have none.
    __device__ __forceinline__ int row(int round) const {
        return team < layout.teams ? (round * call.parts + part) * layout.teams + team : call.n;
    }
    __device__ __forceinline__ int rounds() const {
        const int step = call.parts * layout.teams;
        return (call.n - part * layout.teams + step - 1) / step;
    }

    // A row's columns on their way to where the warp reads them: a quad per thread and group. Where 16 bytes are not
    // there or not aligned, columns come one by one, a warp's side by side.
    __device__ __forceinline__ void fetch(int row, float4* stage) const {
        if (row < call.n) {
            const float* from = call.cost + problem * call.strides[0] + row * call.strides[1] + first + column(0);
            float4* to = stage + threadIdx.x;
            int left = width - column(0);
            if (aligned<16>(from)) {
                from += 4 * lane;
#pragma unroll 4
                for (; left >= 4 * warp_size; left -= step()) {
                    __pipeline_memcpy_async(to, from, 16);
                    from += step(), to += block_size;
                }
                from -= 4 * lane;
            }
#pragma unroll 1  // registers are few
            for (; left > 0; left -= step()) {
                for (int k = lane; k < ::min(left, 4 * warp_size); k += warp_size)
                    __pipeline_memcpy_async(reinterpret_cast<float*>(to - lane) + k, from + k, 4);
                from += step(), to += block_size;
            }
        }
        __pipeline_commit();
    }

    // Of all threads of the team, in all blocks of the cluster; the same bits for all of them. Between two calls with
    // the same slots there must be one with others.
    template <class Op>
    __device__ __forceinline__ float across(float x, float* slots) const {
        x = across_warp<Op>(x);
        if (layout.members == 1 && cluster.size == 1) return x;
        if (lane == 0) slots[warp] = x;
        cluster.size > 1 ? cluster.template barrier<100>() : block_barrier<101>();
        x = Op::none;
        const int half = lane / warps, other = lane % warps;  // two blocks at a time
        float* const from = slots + team * layout.members + other;
        if (other < layout.members && team < layout.teams)
#pragma unroll 1
            for (int rank = half; rank < cluster.size; rank += 2) x = Op::of(x, *cluster.of(from, rank));
        return across_warp<Op>(x);
    }
};

template <class Blocks>
__global__ void __launch_bounds__(block_size, 1) rows_kernel(const __grid_constant__ Streamed streamed) {
    LL_DYN_SMEM(unsigned char, memory);
    Slots& slots = *reinterpret_cast<Slots*>(memory);
    float4* const held = reinterpret_cast<float4*>(memory + sizeof(Slots));  // [stages, groups, block_size]
    const Place<Blocks> place(streamed);
    const Iteration& call = streamed.call;
    const Layout& layout = streamed.layout;
    const int stage_size = layout.groups * block_size;

    // A column that is not there has c = -inf and the cost 0.
    Quad c[most_groups], sums[most_groups];
    float largest_c = 0;  // of the warp's, finite
#pragma unroll
    for (int g = 0; g < most_groups; ++g) {
        if (g >= layout.groups) break;
        const int j = place.column(g) + 4 * place.lane;
        const float* const from = call.c + static_cast<std::int64_t>(place.problem) * call.m + place.first + j;
        c[g] = each([&](int k) { return j + k < place.width ? from[k] : -infinity; });
        sums[g] = {};
        largest_c = fmaxf(largest_c, largest(each([&](int k) { return ::fabsf(finite(c[g].at[k])); })));
    }
    largest_c = across_warp<Larger>(largest_c);
#pragma unroll 1
    for (int k = threadIdx.x; k < layout.stages * stage_size; k += block_size) held[k] = make_float4(0, 0, 0, 0);
    __syncwarp();
    for (int stage = 0; stage < layout.stages; ++stage) place.fetch(place.row(stage), held + stage * stage_size);

    float largest_phi = -infinity;
    for (int round = 0, stage = 0; round < place.rounds(); ++round, stage = stage + 1 < layout.stages ? stage + 1 : 0) {
        const int i = place.row(round);
        const bool there = i < call.n;
        const std::int64_t row = static_cast<std::int64_t>(place.problem) * call.n + i;
        const float log_a = there ? call.log_a[row] : -infinity;
        float4* const now = held + stage * stage_size;
        __pipeline_wait_prior(layout.stages - 1);
        __syncwarp();

        Quad w[most_groups];  // at first the cost
        float top = -infinity;
#pragma unroll
        for (int g = 0; g < most_groups; ++g) {
            if (g >= layout.groups) break;
            w[g] = get(now[g * block_size + threadIdx.x]);
            top = fmaxf(top, largest(each([&](int k) { return c[g].at[k] - w[g].at[k]; })));
        }
        top = finite(place.template across<Larger>(top, slots.maxima));
        place.fetch(place.row(round + layout.stages), now);  // the whole warp has read it

        // c - cost - top is near 0 where it matters: c - cost is near top there, and cost + top near c. The smaller of
        // both is rounded.
        const bool first = ::fabsf(top) > largest_c;
        const float before = first ? top : 0.0f, after = top - before;
        float total = 0;
#pragma unroll
        for (int g = 0; g < most_groups; ++g) {
            if (g >= layout.groups) break;
            w[g] = each([&](int k) {
                return power_of_two((c[g].at[k] - (w[g].at[k] + before) - after) * streamed.scale);
            });
            total += sum(w[g]);
        }
        total = place.template across<Plus>(total, slots.totals);
        if (!there) continue;

        const float s = total == 0.0f ? infinity : -(top + call.epsilon * ::logf(total));
        const float f = log_a > -infinity && s < infinity ? call.damping * s : 0.0f;
        float phi = -infinity;
        if (log_a != -infinity && total != 0.0f) {
            phi = log_a + (f + top) * streamed.inverse;
            if (!(::fabsf(phi) < infinity)) phi = infinity;  // makes NaN of all sums, and so columns are read anew
        }
        if (place.lane == 0 && place.member == 0 && place.cluster.rank == 0) {
            call.s[row] = s;
            call.weighted[row] = f + call.epsilon * log_a;
        }
        if (phi > largest_phi) {
            const float shrunk = exp(largest_phi - phi);
#pragma unroll
            for (int g = 0; g < most_groups; ++g) sums[g] = each([&](int k) { return sums[g].at[k] * shrunk; });
            largest_phi = phi;
        }
        const float v = exp(phi - finite(largest_phi));
#pragma unroll
        for (int g = 0; g < most_groups; ++g) {
            if (g >= layout.groups) break;
            sums[g] = each([&](int k) { return fma(w[g].at[k], v, sums[g].at[k]); });
        }
    }

    // Of the teams, one sum.
    if (place.lane == 0 && place.member == 0) slots.maxima[place.team] = largest_phi;
    block_barrier<102>();
    float exponent = -infinity;
    for (int team = 0; team < layout.teams; ++team) exponent = fmaxf(exponent, slots.maxima[team]);
    const float shrunk = exp(largest_phi - finite(exponent));
#pragma unroll
    for (int g = 0; g < most_groups; ++g) {
        if (g >= layout.groups) break;
        held[g * block_size + threadIdx.x] = pack(each([&](int k) { return sums[g].at[k] * shrunk; }));
    }
    block_barrier<103>();
    const std::int64_t part = static_cast<std::int64_t>(place.problem) * call.parts + place.part;
    const int length = 4 * warp_size * layout.members;  // of a team's group
    for (int j = threadIdx.x; j < place.width; j += block_size) {
        const float* const from = reinterpret_cast<const float*>(held + j / length * block_size) + j % length;
        float found = 0;
        for (int team = 0; team < layout.teams; ++team) found += from[team * length];
        call.sums[part * call.m + place.first + j] = found;
    }
    if (threadIdx.x == 0 && place.cluster.rank == 0) call.exponents[part] = exponent;
    place.cluster.template barrier<104>();  // others may still be reading this block's totals
}

constexpr int join_size = 256;
constexpr int join_warps = join_size / warp_size;
constexpr int ahead = 16;  // elements of a column that a thread has on the way: few columns are read anew, or one

// A block per 32 columns: a warp has some of the parts.
__global__ void __launch_bounds__(join_size) columns_kernel(const __grid_constant__ Iteration call) {
    LL_DYN_SMEM(Partial, shared);
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const int tiles = (call.m + warp_size - 1) / warp_size;
    const std::int64_t problem = static_cast<int>(blockIdx.x) / tiles;
    const int j = static_cast<int>(blockIdx.x) % tiles * warp_size + lane;
    const float* const exponents = call.exponents + problem * call.parts;
    const float* const sums = call.sums + problem * call.parts * call.m + j;
    const float c = j < call.m ? call.c[problem * call.m + j] : -infinity;
    float& t = call.t[problem * call.m + j];

    float exponent = -infinity;
    for (int part = lane; part < call.parts; part += warp_size) exponent = fmaxf(exponent, exponents[part]);
    exponent = across_warp<Larger>(exponent);
    float total = 0;
#pragma unroll 4
    for (int part = j < call.m ? warp : call.parts; part < call.parts; part += join_warps)
        total = fma(sums[static_cast<std::int64_t>(part) * call.m], exp(exponents[part] - finite(exponent)), total);
    shared[threadIdx.x].total = total;
    block_barrier<105>();
    total = 0;
    for (int w = 0; w < join_warps; ++w) total += shared[w * warp_size + lane].total;

    const bool any = c != -infinity && exponent != -infinity, lost = any && !(total >= least);
    if (warp == 0 && j < call.m && !lost)  // in double: what is added up may be of any size beside t
        t = any ? static_cast<float>(c - call.epsilon * (exponent + ::log(static_cast<double>(total)))) : infinity;
    if (!__ballot_sync(~0u, lost)) return;  // all warps see the same
    block_barrier<106>();
    const float* const column = call.cost + problem * call.strides[0] + j;
    const Partial found = adjacent_rows<join_warps, ahead>(
        column, call.strides[1], call.weighted + problem * call.n, 0, call.n, 1.0f / call.epsilon, lost, shared);
    if (warp == 0 && lost) t = found.softmin(call.epsilon);
}

// -------------------------------------------------------------------------------------------------------------- launch

using Kernel = void (*)(Streamed);

Kernel kernel_for(const Layout& layout) { return layout.cluster > 1 ? rows_kernel<Cluster> : rows_kernel<Alone>; }

// The smallest cluster, and in a block the most teams, that leave room for two stages; else for one.
Layout make_layout(const Device& device, int m) {
    Layout layout;
    const int quads = (m + 3) / 4, room = device.shared_per_block - static_cast<int>(sizeof(Slots));
    for (const int stages : {2, 1})
        for (layout.cluster = 1; layout.cluster <= (device.clusters ? most_cluster : 1); layout.cluster *= 2)
            for (layout.teams = warps; layout.teams > 0; --layout.teams) {
                const int share = (quads + layout.cluster - 1) / layout.cluster;
                layout.share = 4 * share;
                layout.members = warps / layout.teams;
                layout.groups = (share + warp_size * layout.members - 1) / (warp_size * layout.members);
                const int stage = layout.groups * block_size * 16;
                layout.stages = ::min(most_stages, room / stage);
                layout.shared = sizeof(Slots) + static_cast<std::size_t>(stage) * layout.stages;
                if (layout.groups > most_groups || layout.stages < stages) continue;
                layout.clusters = granted(kernel_for(layout), device, layout.cluster, block_size, layout.shared);
                if (layout.clusters) return layout;
            }
    return layout;
}

// Layouts ask the driver questions: they are kept.
Layout layout_for(int device, int m) {
    static std::mutex lock;
    static std::map<std::tuple<int, int>, Layout> layouts;
    const std::lock_guard<std::mutex> guard(lock);
    const auto [place, fresh] = layouts.try_emplace({device, m});
    if (fresh) place->second = make_layout(Device(device), m);
    return place->second;
}

// Of a problem's rows: those that take the least time in rounds of the blocks, one after another where there are more
// than the device runs at once. A block begins and ends in the time of some rounds.
int parts_for(const Layout& layout, const Iteration& call) {
    constexpr std::int64_t fixed = 4;
    const std::int64_t rounds = (call.n + layout.teams - 1) / layout.teams;
    std::int64_t best = 1, time = 0;
    for (std::int64_t parts = 1; parts <= rounds && parts <= layout.clusters; ++parts) {
        const std::int64_t turns = (call.count * parts + layout.clusters - 1) / layout.clusters;
        const std::int64_t found = turns * ((rounds + parts - 1) / parts + fixed);
        if (parts == 1 || found < time) best = parts, time = found;
    }
    return static_cast<int>(best);
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_iteration_parts(const Iteration* call, int device) {
    const OnDevice current(device);
    if (current.error()) return 0;
    const Layout layout = layout_for(device, call->m);
    return layout.clusters ? parts_for(layout, *call) : 0;
}

extern "C" int logitless_cuda_iteration(const Iteration* call, int device, void* stream) {
    if (!call->count) return cudaSuccess;
    const OnDevice current(device);
    if (current.error()) return current.error();
    const Layout layout = layout_for(device, call->m);
    if (!layout.clusters) return cudaErrorInvalidConfiguration;
    const unsigned blocks = static_cast<unsigned>(call->count) * call->parts * layout.cluster;
    const Launch launch(blocks, block_size, layout.shared, stream, layout.cluster);
    const float inverse = 1.0f / call->epsilon;
    const Streamed streamed = {*call, layout, inverse, inverse * 0x1.715476p0f};
    const cudaError_t error = LL_LAUNCH(&launch.config, kernel_for(layout), streamed);
    if (error != cudaSuccess) return error;
    const unsigned tiles = static_cast<unsigned>(call->count) * ((call->m + warp_size - 1) / warp_size);
    const Launch second(tiles, join_size, sizeof(Partial) * join_size, stream);
    return LL_LAUNCH(&second.config, columns_kernel, *call);
}
