// Clusters of cuda_host.h under their own name.
#pragma once

#include "cuda_host.h"

namespace cooperative_groups {

struct cluster_group {
    unsigned block_rank() const { return cuda_host::fiber->block->rank; }
    unsigned num_blocks() const { return static_cast<unsigned>(cuda_host::cluster->blocks.size()); }
    void sync() const { cuda_host::wait(cuda_host::cluster->barrier); }

    template <class T>
    T* map_shared_rank(T* mine, int rank) const {
        const auto offset = reinterpret_cast<unsigned char*>(mine) - cuda_host::fiber->block->memory.get();
        return reinterpret_cast<T*>(cuda_host::cluster->blocks[rank].memory.get() + offset);
    }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
