// Runs CUDA kernels on the CPU for tests: one fiber per CUDA thread, the blocks of a cluster together, clusters one
// after another. What csrc/cuda uses is here and in the headers beside this one, nothing else; no inline PTX, mma or
// TMA. It says nothing of performance, and nothing of memory order between threads that run at the same time.
//
// Each block has shared memory of its own, NaN before it begins and after it has ended. cp.async copies when it is
// waited for, in odd orders at once. CUDA_HOST_ORDER says in which order threads and clusters run: 0 forward, 1
// backward, any other number seeds an order, for threads a new one each round, and warps and blocks that are left
// behind for a while. Threads that wait in vain for each other abort.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

inline dim3 blockDim, gridDim;

namespace cuda_host {

// The device that kernels believe to be on.
struct Properties {
    int processors = 4, shared_per_block = 227 << 10, shared_per_processor = 228 << 10, clusters = 1, most_cluster = 8;
};
inline Properties properties;
inline int current_device = 0;
inline std::map<std::pair<int, const void*>, int> shared_allowed, large_clusters_allowed;  // by device and kernel
inline int dropped_barrier = 0;    // LL_TEST_DROP_BARRIER
inline bool early = false;         // copies are made at once
inline long launches[4] = {};    // of 1 block, of clusters, blocks of the largest cluster, threads of the last

struct Barrier {
    int arrived = 0, expected = 0;
    unsigned generation = 0;

    void arrive() {
        if (++arrived >= expected) open();
    }
    void leave() {  // a thread that has ended no longer counts
        --expected;
        if (expected && arrived >= expected) open();
    }
    void open() {
        arrived = 0;
        ++generation;
    }
};

struct Block;

struct Copy {
    void* to;
    const void* from;
    std::size_t size;
};

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started, done;
    uint3 thread;
    int index;
    Block* block;
    const Barrier* waits_for;
    unsigned generation, shuffles;
    std::vector<Copy> copies;
    std::vector<std::size_t> groups;  // of copies, that are committed: where they end
};

struct Block {
    uint3 index;
    int rank;
    std::unique_ptr<unsigned char[]> memory;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<unsigned char> exchanged;  // 8 bytes a thread, twice: shuffles take turns
    int alive;
};

struct Cluster {
    std::vector<Block> blocks;
    Barrier barrier;
};

inline Cluster* cluster = nullptr;
inline Fiber* fiber = nullptr;
inline std::size_t shared_size;
inline std::function<void()> body;
#if defined(__SANITIZE_ADDRESS__)
inline ucontext_t scheduler;
#else
inline jmp_buf scheduler;
#endif

constexpr std::size_t stack_size = 64 << 10;

// glibc's swapcontext makes a system call; a jump does not, but the sanitizer must not see one.
inline void leave() {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&fiber->context, &scheduler);
#else
    if (!_setjmp(fiber->place)) _longjmp(scheduler, 1);
#endif
}

inline void enter(Fiber& next) {
    fiber = &next;
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&scheduler, &next.context);
#else
    if (_setjmp(scheduler)) return;
    if (next.started) _longjmp(next.place, 1);
    next.started = true;
    setcontext(&next.context);
#endif
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    barrier.arrive();
    if (barrier.generation != generation) return;
    fiber->waits_for = &barrier;
    fiber->generation = generation;
    leave();
}

inline Barrier& warp() { return fiber->block->warps[fiber->index / 32]; }

inline void poison(Block& block) { std::memset(block.memory.get(), 0xff, shared_size); }

inline void run_thread() {
    body();
    Block& block = *fiber->block;
    fiber->done = true;
    block.barrier.leave();
    cluster->barrier.leave();
    warp().leave();
    if (--block.alive == 0) poison(block);
    leave();
}

inline void run_cluster(std::vector<Fiber>& fibers, std::mt19937& random, int order) {
    const int threads = blockDim.x;
    cluster->barrier = {0, static_cast<int>(fibers.size()), 0};
    for (Block& block : cluster->blocks) {
        poison(block);
        block.barrier = {0, threads, 0};
        block.warps.assign((threads + 31) / 32, {});
        for (int i = 0; i < threads; ++i) ++block.warps[i / 32].expected;
        block.alive = threads;
    }
    for (Fiber& f : fibers) {
        f.started = f.done = false;
        f.waits_for = nullptr;
        f.shuffles = 0;
        f.copies.clear();
        f.groups.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = stack_size;
        f.context.uc_link = nullptr;
        makecontext(&f.context, run_thread, 0);
    }
    std::vector<int> turn(fibers.size());
    std::iota(turn.begin(), turn.end(), 0);
    if (order == 1) std::reverse(turn.begin(), turn.end());
    const unsigned warps = (threads + 31) / 32, blocks = cluster->blocks.size();
    std::vector<unsigned> behind(warps * blocks, 0);  // until which round
    for (unsigned round = 0;; ++round) {
        bool alive = false, progress = false, left_behind = false;
        if (order > 1) {
            std::shuffle(turn.begin(), turn.end(), random);
            if (random() % 4 == 0) behind[random() % behind.size()] = round + random() % 32;
            if (random() % 16 == 0) std::fill_n(&behind[random() % blocks * warps], warps, round + random() % 32);
        }
        for (const int i : turn) {
            Fiber& f = fibers[i];
            if (f.done) continue;
            alive = true;
            if (f.waits_for && f.waits_for->generation == f.generation) continue;
            if (behind[f.block->rank * warps + f.index / 32] > round) {
                left_behind = true;
                continue;
            }
            f.waits_for = nullptr;
            progress = true;
            enter(f);
        }
        if (!alive) return;
        if (!progress && !left_behind) {
            std::fprintf(stderr, "cuda_host: deadlock: threads of a block wait at different barriers\n");
            std::abort();
        }
    }
}

template <class Argument>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
    static std::vector<Fiber> pool;
    const char* text = std::getenv("CUDA_HOST_ORDER");
    const int order = text ? std::atoi(text) : 0;
    early = order % 2;
    const unsigned size = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
    const std::pair<int, const void*> function(current_device, reinterpret_cast<const void*>(kernel));
    const auto allowed = shared_allowed.find(function);
    const std::size_t most_shared = allowed == shared_allowed.end() ? 48 << 10 : allowed->second;
    if (config->dynamicSmemBytes > most_shared || config->blockDim.x % 32 || config->gridDim.x % size ||
        config->gridDim.x == 0 || (size > 8 && !large_clusters_allowed[function]))
        return cudaErrorInvalidConfiguration;
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    shared_size = config->dynamicSmemBytes;
    ++launches[size > 1];
    launches[2] = std::max<long>(launches[2], size);
    launches[3] = blockDim.x;
    body = [&] { kernel(argument); };

    Cluster blocks;
    cluster = &blocks;
    blocks.blocks.resize(size);
    std::vector<Fiber> fibers;
    fibers.swap(pool);
    fibers.resize(size * blockDim.x);
    for (unsigned rank = 0; rank < size; ++rank) {
        Block& block = blocks.blocks[rank];
        block.rank = rank;
        block.memory.reset(new unsigned char[shared_size]);
        block.exchanged.assign(16 * blockDim.x, 0);
        for (unsigned i = 0; i < blockDim.x; ++i) {
            Fiber& f = fibers[rank * blockDim.x + i];
            if (!f.stack) f.stack.reset(new char[stack_size]);
            f.block = &block;
            f.index = i;
            f.thread = {i, 0, 0};
        }
    }
    std::mt19937 random(order);
    std::vector<unsigned> first(gridDim.x / size);
    std::iota(first.begin(), first.end(), 0);
    if (order == 1) std::reverse(first.begin(), first.end());
    if (order > 1) std::shuffle(first.begin(), first.end(), random);
    for (const unsigned number : first) {
        for (Block& block : blocks.blocks) block.index = {number * size + block.rank, 0, 0};
        run_cluster(fibers, random, order);
    }
    pool.swap(fibers);
    cluster = nullptr;
    return cudaSuccess;
}

template <class T>
T shuffle(T value, int lane) {
    static_assert(sizeof(T) <= 8, "shuffle of more than 8 bytes");
    Block& block = *fiber->block;
    unsigned char* const values = &block.exchanged[fiber->shuffles++ % 2 * 8 * blockDim.x];
    std::memcpy(values + 8 * fiber->index, &value, sizeof value);
    wait(warp());
    const int source = fiber->index / 32 * 32 + lane;
    if (lane >= 0 && lane < 32) std::memcpy(&value, values + 8 * source, sizeof value);
    return value;
}

}  // namespace cuda_host

#define threadIdx (::cuda_host::fiber->thread)
#define blockIdx (::cuda_host::fiber->block->index)
#define LL_LAUNCH(config, kernel, call) ::cuda_host::launch(config, kernel, call)
#define LL_DYN_SMEM(T, name) T* const name = reinterpret_cast<T*>(::cuda_host::fiber->block->memory.get())
#define LL_TEST_DROP_BARRIER ::cuda_host::dropped_barrier

inline void __syncthreads() { ::cuda_host::wait(::cuda_host::fiber->block->barrier); }
inline void __syncwarp(unsigned = ~0u) { ::cuda_host::wait(::cuda_host::warp()); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return ::cuda_host::shuffle(value, (::cuda_host::fiber->index % 32) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool flag) {
    unsigned found = 0;
    for (int lane = 0; lane < 32; ++lane) found |= unsigned(cuda_host::shuffle(flag, lane)) << lane;
    return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned most) {
    const unsigned before = *at;
    *at = before >= most ? 0 : before + 1;
    return before;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class T>
void __stwb(T* to, T value) {
    *to = value;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// The runtime's host side, as far as the launchers use it.
extern "C" {
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_host::current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return cuda_host::current_device = device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused by cuda_host"; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
        cuda_host::large_clusters_allowed[{cuda_host::current_device, kernel}] = value;
        return cudaSuccess;
    }
    cuda_host::shared_allowed[{cuda_host::current_device, kernel}] = value;
    return value > cuda_host::properties.shared_per_block ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const cuda_host::Properties& p = cuda_host::properties;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = p.processors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.shared_per_block; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.shared_per_processor; break;
        case cudaDevAttrClusterLaunch: *value = p.clusters; break;
        default: return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads, size_t shared) {
    *count = min(2048 / threads, cuda_host::properties.shared_per_processor / (static_cast<int>(shared) + 1024));
    return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
    const int size = config->attrs[0].val.clusterDim.x;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, config->blockDim.x, config->dynamicSmemBytes);
    *count = *count * cuda_host::properties.processors / size;
    const bool large = cuda_host::large_clusters_allowed[{cuda_host::current_device, kernel}];
    if (size > (large ? 16 : 8) || size > cuda_host::properties.most_cluster) *count = 0;
    return cudaSuccess;
}
}
