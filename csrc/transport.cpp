// The bindings of the L1 cost and of doubly stochastic matrices on a CPU.

#include <algorithm>
#include <array>
#include <utility>

#include "bindings.h"
#include "copies.h"
#include "cpu/parallel.h"
#include "cpu/transport.h"

namespace logitless {
namespace transport {
namespace {

constexpr InUse<L1Kernels> l1_kernels;

using Strides = std::array<std::int64_t, 3>;

Probabilities probabilities(const Chunk& chunk, Address max, Address sum, std::int64_t tokens) {
    return {chunk, pointer<const double>(max), pointer<const double>(sum), tokens};
}

void l1_forward(std::int64_t problems, std::int64_t columns, const Probabilities& own, const Probabilities& other,
                Address cost, Address moment, int threads) {
    L1 call = {problems, columns, 1, own, other, pointer<double>(cost), pointer<double>(moment)};
    const py::gil_scoped_release unlocked;
    const std::int64_t size = problems * own.tokens * other.tokens;
    call.segments = L1::segments_for(problems * call.blocks(), columns);
    std::vector<double> parts;
    if (call.segments > 1) {
        parts.resize((moment ? 2 : 1) * call.segments * size);
        call.cost = parts.data();
        if (moment) call.moment = parts.data() + call.segments * size;
    }
    const auto kernel = l1_kernels->forward;
    parallel(call.pieces(), 1 << 16, threads,
             [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
    if (call.segments == 1) return;
    const auto joined = [&](const double* from, double* to) {
        std::copy(from, from + size, to);
        for (std::int64_t segment = 1; segment < call.segments; ++segment)
            for (std::int64_t i = 0; i < size; ++i) to[i] += from[segment * size + i];
    };
    joined(call.cost, pointer<double>(cost));
    if (moment) joined(call.moment, pointer<double>(moment));
}

void l1_backward(std::int64_t problems, std::int64_t columns, const Probabilities& own, const Probabilities& other,
                 std::pair<Address, Strides> gradient, std::pair<Address, Strides> moment,
                 std::pair<Address, std::int64_t> out, int threads) {
    L1Backward call = {{problems, columns, 1, own, other, nullptr, nullptr},
                       {pointer<const float>(gradient.first), pointer<const double>(moment.first), {}, {}},
                       pointer<float>(out.first), out.second};
    std::copy(gradient.second.begin(), gradient.second.end(), call.matrices.gradient_strides);
    std::copy(moment.second.begin(), moment.second.end(), call.matrices.moment_strides);
    const py::gil_scoped_release unlocked;
    call.segments = L1::segments_for(problems * call.blocks(), columns);
    const auto kernel = l1_kernels->backward;
    parallel(call.pieces(), 1 << 16, threads,
             [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
}

void make_doubly_stochastic(std::int64_t count, int n, int iterations, const std::string& dialect, Address logits,
                            Address upstream, Address out, Address residual, int threads) {
    constexpr InUse<DoublyStochasticKernels> kernels;
    const DoublyStochastic call = {
        n, iterations, number<Dialect>(dialect_names, dialect), pointer<const float>(logits),
        pointer<const float>(upstream), pointer<float>(out), pointer<float>(residual)};
    const auto kernel = upstream ? kernels->backward : kernels->forward;
    const py::gil_scoped_release unlocked;
    parallel(count, static_cast<std::int64_t>(n) * n * iterations, threads,
             [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
}

}  // namespace

void bind(py::module_ module) {
    py::class_<Probabilities>(module, "Probabilities", py::module_local())
        .def(py::init(&probabilities), py::arg("chunk"), py::arg("max"), py::arg("sum"), py::arg("tokens"));
    module.def("l1", &l1_forward, py::arg("problems"), py::arg("columns"), py::arg("own"), py::arg("other"),
               py::kw_only(), py::arg("cost"), py::arg("moment"), py::arg("threads"));
    module.def("l1_backward", &l1_backward, py::arg("problems"), py::arg("columns"), py::arg("own"), py::arg("other"),
               py::kw_only(), py::arg("gradient"), py::arg("moment"), py::arg("out"), py::arg("threads"));
    module.def("doubly_stochastic", &make_doubly_stochastic, py::arg("count"), py::arg("n"), py::arg("iterations"),
               py::arg("dialect"), py::kw_only(), py::arg("logits"), py::arg("upstream"), py::arg("out"),
               py::arg("residual"), py::arg("threads"));
}

}  // namespace transport
}  // namespace logitless
