// Rows shared out among threads. Which thread takes a row never changes its result.
//
// torch's CPU operations run on an OpenMP runtime whose idle workers spin for a while; threads of another pool would
// fight them for the cores. So the runtime that is already in the process is asked (every OpenMP runtime on Linux
// answers to GOMP_parallel), without linking to one of our own; std::thread serves where there is none.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace logitless {

// body(begin, end) on disjoint pieces of [0, rows), on at most `threads` threads, this one among them.
template <class Body>
void parallel(std::int64_t rows, std::int64_t columns, int threads, const Body& body) {
    constexpr std::int64_t piece_size = 1 << 16;  // elements: some ten microseconds of work, far above a wake-up's cost
    const std::int64_t step = std::max<std::int64_t>(1, piece_size / std::max<std::int64_t>(columns, 1));
    const auto team = static_cast<unsigned>(std::min<std::int64_t>(threads, (rows + step - 1) / step));
    if (team <= 1) {
        body(0, rows);
        return;
    }

    // A worker takes the pieces of its own share first, which are then in its cache for the next kernel, and what is left
    // of the others' after that: any number of workers (OpenMP may grant fewer) finishes them all.
    struct alignas(64) Share {
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    struct Work {
        const Body& body;
        const std::int64_t step;
        std::vector<Share> shares;
        std::atomic<unsigned> workers{0};
    } work{body, step, std::vector<Share>(team)};
    const std::int64_t pieces = (rows + step - 1) / step;
    for (unsigned i = 0; i < team; ++i) {
        work.shares[i].next = pieces * i / team * step;
        work.shares[i].end = std::min(pieces * (i + 1) / team * step, rows);
    }
    const auto take = [](void* data) {
        Work& work = *static_cast<Work*>(data);
        const auto team = static_cast<unsigned>(work.shares.size()), own = work.workers++;
        for (unsigned i = 0; i < team; ++i) {
            Share& share = work.shares[(own + i) % team];
            for (std::int64_t begin; (begin = share.next.fetch_add(work.step)) < share.end;)
                work.body(begin, std::min(begin + work.step, share.end));
        }
    };

    using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
    static const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (openmp) {
        openmp(take, &work, team, 0);
        return;
    }
    std::vector<std::thread> others;
    try {
        while (others.size() + 1 < team) others.emplace_back(take, &work);
    } catch (const std::system_error&) {  // no more threads to be had: those that started do it all
    }
    take(&work);
    for (std::thread& other : others) other.join();
}

}  // namespace logitless
