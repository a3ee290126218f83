// The Sinkhorn kernels of logitless._C.cuda for Python.

#pragma once

#include "../bindings.h"
#include "doubly_stochastic.h"
#include "l1.h"
#include "rows.h"
#include "sinkhorn.h"

namespace logitless::cuda {
namespace {

inline void check(int error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + logitless_cuda_error(error));
}

inline void bind_sinkhorn(py::module_& module) {
    module.def(
        "doubly_stochastic",
        [](int device, Address stream, Address logits, Address gradient, Address out, Address residual,
           std::int64_t matrices, int n, int iterations, const std::string& dialect) {
            const DoublyStochastic call = {
                pointer<const float>(logits), pointer<const float>(gradient), pointer<float>(out),
                pointer<float>(residual), matrices, n, iterations,
                number<Dialect>(dialect_names, dialect)};
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_doubly_stochastic(&call, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("logits"), py::arg("gradient"), py::arg("out"),
        py::arg("residual"), py::arg("matrices"), py::arg("n"), py::arg("iterations"), py::arg("dialect"));

    const auto problems = [](const Addresses& tensors, const std::vector<std::int64_t>& strides, int count, int n,
                             int m, int annealed, int limit, float epsilon, float tolerance, float rho_a,
                             float rho_b) {
        const auto of = [&](const char* name) { return pointer<const float>(tensors, name); };
        return SinkhornProblems{of("cost"), {strides.at(0), strides.at(1), strides.at(2)}, of("a"), of("b"), of("g"),
                                of("annealed"), count, n, m, annealed, limit, epsilon, tolerance, rho_a, rho_b};
    };
    py::class_<SinkhornProblems>(module, "SinkhornProblems", py::module_local())
        .def(py::init(problems), py::kw_only(), py::arg("tensors"), py::arg("strides"), py::arg("count"), py::arg("n"),
             py::arg("m"), py::arg("annealed"), py::arg("limit"), py::arg("epsilon"), py::arg("tolerance"),
             py::arg("rho_a"), py::arg("rho_b"));
    module.def("sinkhorn_fits", &logitless_cuda_sinkhorn_fits, py::arg("n"), py::arg("m"), py::arg("device"));
    module.def(
        "sinkhorn_run",
        [](int device, Address stream, const SinkhornProblems& problems, const Addresses& out) {
            const auto of = [&](const char* name) { return pointer<float>(out, name); };
            const SinkhornRun run = {of("f"), of("g"), of("rows"), pointer<bool>(out, "reached"),
                                     pointer<std::int64_t>(out, "iterations"), pointer<bool>(out, "stopped"),
                                     of("history_f"), of("history_g"), pointer<int>(out, "last")};
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_sinkhorn_run(&problems, &run, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("problems"), py::arg("out"));
    module.def(
        "sinkhorn_run_backward",
        [](int device, Address stream, const SinkhornProblems& problems, const Addresses& given) {
            const auto of = [&](const char* name) { return pointer<float>(given, name); };
            const SinkhornRunBackward run = {of("history_f"), of("history_g"), pointer<const int>(given, "last"),
                                             of("of_f"), of("of_g"), {of("of_cost"), of("of_a"), of("of_b")}};
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_sinkhorn_run_backward(&problems, &run, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("problems"), py::arg("given"));
    module.def(
        "sinkhorn_transport",
        [](int device, Address stream, const SinkhornProblems& problems, const Addresses& out) {
            const auto of = [&](const char* name) { return pointer<float>(out, name); };
            const SinkhornTransport run = {of("value"), of("history_f"), of("history_g"),
                                           {of("of_cost"), of("of_a"), of("of_b")}};
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_sinkhorn_transport(&problems, &run, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("problems"), py::arg("out"));

    const auto softmin = [](Address cost, const std::vector<std::int64_t>& strides, Address c, Address s, int count,
                            int n, int m, float epsilon) {
        return SoftMin{pointer<const float>(cost), {strides.at(0), strides.at(1), strides.at(2)},
                       pointer<const float>(c), pointer<float>(s), nullptr, count, n, m, 1, epsilon};
    };
    py::class_<SoftMin>(module, "SoftMin", py::module_local())
        .def(py::init(softmin), py::kw_only(), py::arg("cost"), py::arg("strides"), py::arg("c"), py::arg("s"),
             py::arg("count"), py::arg("n"), py::arg("m"), py::arg("epsilon"))
        .def("parts", &logitless_cuda_softmin_parts, py::arg("device"));
    module.def(
        "softmin",
        [](int device, Address stream, SoftMin call, int parts, Address partials) {
            call.parts = parts;
            call.partials = pointer<float>(partials);
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_softmin(&call, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("call"), py::arg("parts"), py::arg("partials"));

    const auto iteration = [](const Addresses& tensors, const std::vector<std::int64_t>& strides, int count, int n,
                              int m, float damping, float epsilon) {
        const auto of = [&](const char* name) { return pointer<float>(tensors, name); };
        return Iteration{of("cost"), {strides.at(0), strides.at(1)}, of("c"), of("log_a"), of("s"), of("t"), nullptr,
                         nullptr, nullptr, count, n, m, 0, damping, epsilon};
    };
    py::class_<Iteration>(module, "Iteration", py::module_local())
        .def(py::init(iteration), py::kw_only(), py::arg("tensors"), py::arg("strides"), py::arg("count"),
             py::arg("n"), py::arg("m"), py::arg("damping"), py::arg("epsilon"))
        .def("parts", &logitless_cuda_iteration_parts, py::arg("device"));
    module.def(
        "iteration",
        [](int device, Address stream, Iteration call, int parts, const Addresses& scratch) {
            call.parts = parts;
            call.sums = pointer<float>(scratch, "sums");
            call.exponents = pointer<float>(scratch, "exponents");
            call.weighted = pointer<float>(scratch, "weighted");
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_iteration(&call, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("call"), py::arg("parts"), py::arg("scratch"));

    using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
    using Side = std::tuple<Chunk, Address, Address, int>;  // chunk, max, sum, tokens
    const auto l1 = [](const Side& p, const Side& q, int problems, std::int64_t columns) {
        const auto side = [](const Side& of) {
            const auto& [chunk, max, sum, tokens] = of;
            return Probabilities{chunk, pointer<const double>(max), pointer<const double>(sum), tokens};
        };
        L1 call = {};
        call.p = side(p);
        call.q = side(q);
        call.problems = problems;
        call.columns = columns;
        return call;
    };
    py::class_<L1>(module, "L1", py::module_local())
        .def(py::init(l1), py::kw_only(), py::arg("p"), py::arg("q"), py::arg("problems"), py::arg("columns"))
        .def("parts", &logitless_cuda_l1_parts, py::arg("device"));
    module.def(
        "l1",
        [](int device, Address stream, L1 call, int parts, Address cost, Address moments) {
            call.parts = parts;
            call.cost = pointer<double>(cost);
            call.moments = pointer<double>(moments);
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_l1(&call, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("call"), py::arg("parts"), py::arg("cost"),
        py::arg("moments"));
    module.def(
        "l1_backward",
        [](int device, Address stream, L1 call, const std::pair<Address, Strides>& gradient,
           const std::pair<Address, Strides>& moments, const std::pair<Address, std::int64_t>& out) {
            const auto set = [](std::int64_t(&to)[3], const Strides& strides) {
                std::tie(to[0], to[1], to[2]) = strides;
            };
            call.gradient = pointer<const float>(gradient.first);
            call.given = pointer<const double>(moments.first);
            set(call.gradient_strides, gradient.second);
            set(call.given_strides, moments.second);
            call.out = pointer<float>(out.first);
            call.out_stride = out.second;
            check([&] {
                const py::gil_scoped_release unlocked;
                return logitless_cuda_l1_backward(&call, device, pointer<void>(stream));
            }());
        },
        py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("call"), py::arg("gradient"), py::arg("moments"),
        py::arg("out"));
}

}  // namespace
}  // namespace logitless::cuda
