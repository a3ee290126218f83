// The host side of a launch: the device's properties, shapes of grids, and the device made current meanwhile.

#pragma once

#include "block.cuh"

namespace logitless::cuda {
namespace {

// Makes a device current while it lives.
class OnDevice {
    int before = 0;
    cudaError_t found;

public:
    explicit OnDevice(int device) : found(cudaGetDevice(&before)) {
        if (found == cudaSuccess) found = cudaSetDevice(device);
    }
    ~OnDevice() {
        if (found == cudaSuccess) cudaSetDevice(before);
    }
    cudaError_t error() const { return found; }
};

struct Device {
    int number, processors, shared_per_block, shared_per_processor, clusters;

    explicit Device(int number) : number(number) {
        const auto get = [number](int* to, cudaDeviceAttr attribute) {
            *to = 0;
            cudaDeviceGetAttribute(to, attribute, number);
        };
        get(&processors, cudaDevAttrMultiProcessorCount);
        get(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        get(&shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
        get(&clusters, cudaDevAttrClusterLaunch);
    }
};

// A launch configuration and the attribute it points to.
struct Launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};

    Launch(unsigned blocks, unsigned threads, std::size_t shared, void* stream, unsigned cluster = 1) {
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream);
        if (cluster > 1) {
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = cluster;
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            config.attrs = &attribute;
            config.numAttrs = 1;
        }
    }
    Launch(const Launch&) = delete;
};

// How many clusters of so many blocks the device runs at once; 0 where it does not grant them.
template <class Call>
int granted(void (*kernel)(Call), const Device& device, int cluster, int threads, std::size_t shared) {
    const void* function = reinterpret_cast<const void*>(kernel);
    int count = 0;
    // Always the device's: the attribute is the kernel's, and this plan is not its only one.
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    if (error == cudaSuccess && cluster == 1) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, threads, shared);
        count *= device.processors;
    } else if (error == cudaSuccess) {
        if (cluster > 8) error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        const Launch launch(cluster, threads, shared, nullptr, cluster);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, function, &launch.config);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();  // it was a question; the answer is no
        return 0;
    }
    return count;
}

constexpr std::int64_t most_columns = (std::int64_t(1) << 31) - 64;  // column numbers are int

// A block of threads for so many quads: each thread gets a few, and a short row no more threads than it needs.
inline int threads_for(int quads, int most) {
    int threads = 64;
    while (threads < most && threads * 4 < quads) threads *= 2;
    return threads < most ? threads : most;
}

}  // namespace
}  // namespace logitless::cuda
