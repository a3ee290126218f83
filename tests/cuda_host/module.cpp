// The CUDA kernels of csrc/cuda on the CPU, as the Python module cuda_host: what logitless._C.cuda has, and the knobs
// of cuda_host.h.

#include "cuda_host.h"

#include "../../csrc/cuda/bindings.h"
#include "../../csrc/token_recipe.h"

namespace py = pybind11;

PYBIND11_MODULE(cuda_host, module) {
    using logitless::TokenRecipe;
    py::class_<TokenRecipe>(module, "TokenRecipe", py::module_local()).def(py::init(&logitless::token_recipe));
    logitless::cuda::bind(module);
    module.def(
        "device",
        [](int processors, int shared_per_block, int shared_per_processor, bool clusters, int most_cluster) {
            cuda_host::properties = {processors, shared_per_block, shared_per_processor, clusters, most_cluster};
        },
        py::kw_only(), py::arg("processors"), py::arg("shared_per_block"), py::arg("shared_per_processor"),
        py::arg("clusters"), py::arg("most_cluster"));
    module.def("current_device", [] { return cuda_host::current_device; });
    module.def("drop_barrier", [](int number) { cuda_host::dropped_barrier = number; });
    module.def("launches", [] {  // since the last call
        const auto found = std::vector<long>(std::begin(cuda_host::launches), std::end(cuda_host::launches));
        std::fill(std::begin(cuda_host::launches), std::end(cuda_host::launches), 0);
        return py::dict(py::arg("single") = found[0], py::arg("clusters") = found[1],
                        py::arg("largest_cluster") = found[2], py::arg("threads") = found[3]);
    });
}
