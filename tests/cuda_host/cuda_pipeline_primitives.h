// cp.async for cuda_host.h: a copy happens as late as it may, and in some orders of threads at once too.
#pragma once

#include "cuda_host.h"

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t size) {
    const auto misaligned = [size](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % size != 0; };
    if ((size != 4 && size != 8 && size != 16) || misaligned(to) || misaligned(from)) {
        std::fprintf(stderr, "cuda_host: cp.async of %zu bytes from %p to %p\n", size, from, to);
        std::abort();
    }
    if (cuda_host::early)
        std::memcpy(to, from, size);
    else
        cuda_host::fiber->copies.push_back({to, from, size});
}
inline void __pipeline_commit() { cuda_host::fiber->groups.push_back(cuda_host::fiber->copies.size()); }
inline void __pipeline_wait_prior(std::size_t prior) {  // all groups but the last `prior`
    std::vector<cuda_host::Copy>& copies = cuda_host::fiber->copies;
    std::vector<std::size_t>& groups = cuda_host::fiber->groups;
    if (groups.size() <= prior) return;
    const std::size_t count = groups[groups.size() - 1 - prior];
    for (std::size_t i = 0; i < count; ++i) std::memcpy(copies[i].to, copies[i].from, copies[i].size);
    copies.erase(copies.begin(), copies.begin() + count);
    groups.erase(groups.begin(), groups.end() - prior);
    for (std::size_t& end : groups) end -= count;
}
