// logitless._C.cuda: the launchers of cuda/rows.h and cuda/tokens.h for Python. TokenRecipe is bound elsewhere.

#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../bindings.h"
#include "rows.h"
#include "sinkhorn_bindings.h"
#include "tokens.h"

namespace logitless::cuda {
namespace {

// divergence, parameters, coefficient, value, slope
using BoundTerm = std::tuple<std::string, std::vector<Address>, Address, Address, Address>;

// One kernel. The arguments it has no use for are left out.
void bind_launcher(py::module_& module, const char* name, int (*launcher)(const Call*, int, void*)) {
    const auto run = [launcher](int device, Address stream, std::int64_t rows, std::int64_t columns,
                                const Chunk& student, std::optional<Chunk> teacher, Address targets, Address weights,
                                const Addresses& accumulators, const Addresses& normalizers,
                                const Addresses& coefficients, const std::vector<BoundTerm>& divergences,
                                Address hot, Address weight_vector, std::pair<Address, std::int64_t> rows_gradient,
                                Address live, std::tuple<Address, std::int64_t, int> out) {
        if (divergences.size() > most_terms)
            throw std::invalid_argument("at most " + std::to_string(most_terms) + " generic divergences in one call");
        Call call = {};
        call.rows = rows;
        call.columns = columns;
        call.student = student;
        call.teacher = teacher.value_or(Chunk{});
        const auto sum = [&](const char* key) { return pointer<double>(accumulators, key); };
        call.statistics = {
            pointer<const std::int64_t>(targets), pointer<const float>(weights),
            sum("max"), sum("sum"), sum("target"), sum("first"), sum("square"), sum("weighted"), sum("mass"),
            sum("teacher_max"), sum("teacher_sum"), sum("forward"), sum("reverse"),
            pointer<std::int64_t>(accumulators, "argmax")};
        call.normalizers = normalizers_of(normalizers);
        const auto of = [&](const char* key) { return pointer<const float>(coefficients, key); };
        Combination& c = call.combination;
        c.one_hot = of("one_hot");
        c.q = of("q");
        c.q_lse = of("q_lse");
        c.p = of("p");
        c.weights = of("weights");
        c.q_log_q = of("q_log_q");
        c.q_squared = of("q_squared");
        c.q_log_ratio = of("q_log_ratio");
        c.targets = pointer<const std::int64_t>(hot);
        c.weight_vector = pointer<const float>(weight_vector);
        c.rows = pointer<const float>(rows_gradient.first);
        c.rows_stride = rows_gradient.second;
        c.live = pointer<const bool>(live);
        for (const auto& [divergence, parameters, coefficient, value, slope] : divergences) {
            Term& term = c.terms[c.term_count++];
            term.functor = functor(divergence);
            set_parameters(term.parameters, parameters);
            term.coefficient = pointer<const float>(coefficient);
            term.value = pointer<double>(value);
            term.slope = pointer<double>(slope);
        }
        const auto [to, stride, type] = out;
        call.output = {pointer<void>(to), stride, static_cast<Type>(type)};

        const int error = [&] {
            const py::gil_scoped_release unlocked;
            return launcher(&call, device, pointer<void>(stream));
        }();
        if (error) throw std::runtime_error(std::string("CUDA: ") + logitless_cuda_error(error));
    };
    const Addresses none;
    module.def(name, run, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("rows"), py::arg("columns"),
               py::arg("student"), py::arg("teacher"), py::arg("targets") = 0, py::arg("weights") = 0,
               py::arg("accumulators") = none, py::arg("normalizers") = none, py::arg("coefficients") = none,
               py::arg("divergences") = std::vector<BoundTerm>(), py::arg("hot") = 0, py::arg("weight_vector") = 0,
               py::arg("rows_gradient") = std::pair<Address, std::int64_t>(0, 0), py::arg("live") = 0,
               py::arg("out") = std::tuple<Address, std::int64_t, int>(0, 0, 0));
}

TokenCall token_call(const TokenRecipe& recipe, std::int64_t tokens, std::int64_t sequences) {
    TokenCall call = {};
    call.recipe = recipe;
    call.tokens = tokens;
    call.sequences = sequences;
    return call;
}

template <class Launcher>
void launch_tokens(Launcher launcher, const TokenCall& call, int device, Address stream) {
    const int error = [&] {
        const py::gil_scoped_release unlocked;
        return launcher(&call, device, pointer<void>(stream));
    }();
    if (error) throw std::runtime_error(std::string("CUDA: ") + logitless_cuda_error(error));
}

void bind_tokens(py::module_& module) {
    module.def(
        "token_workspace",
        [](const TokenRecipe& recipe, int device, std::int64_t tokens, std::int64_t sequences) {
            const TokenCall call = token_call(recipe, tokens, sequences);
            return logitless_cuda_token_workspace(&call, device);
        },
        py::arg("recipe"), py::kw_only(), py::arg("device"), py::arg("tokens"), py::arg("sequences"));
    module.def(
        "tokens",
        [](const TokenRecipe& recipe, int device, Address stream, std::int64_t tokens, std::int64_t sequences,
           const std::vector<std::pair<Address, bool>>& inputs, Address mask, Address offsets, Address denominator,
           Address results, Address slopes, Address through, Address workspace, Address ticket) {
            TokenCall call = token_call(recipe, tokens, sequences);
            for (std::size_t slot = 0; slot < inputs.size(); ++slot) {
                call.inputs[slot] = pointer<const float>(inputs[slot].first);
                call.per_sequence |= static_cast<unsigned>(inputs[slot].second) << slot;
            }
            call.mask = pointer<const bool>(mask);
            call.offsets = pointer<const std::int64_t>(offsets);
            call.denominator = pointer<const float>(denominator);
            call.results = pointer<double>(results);
            call.slopes = pointer<float>(slopes);
            call.through = pointer<bool>(through);
            call.workspace = pointer<double>(workspace);
            call.ticket = pointer<unsigned>(ticket);
            launch_tokens(logitless_cuda_tokens, call, device, stream);
        },
        py::arg("recipe"), py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("tokens"),
        py::arg("sequences"), py::arg("inputs"), py::arg("mask"), py::arg("offsets"), py::arg("denominator"),
        py::arg("results"), py::arg("slopes"), py::arg("through"), py::arg("workspace"), py::arg("ticket"));
    module.def(
        "tokens_backward",
        [](const TokenRecipe& recipe, int device, Address stream, std::int64_t tokens, std::int64_t sequences,
           Address offsets, Address results, Address slopes, Address through, Address workspace, Address upstream,
           Address out) {
            TokenCall call = token_call(recipe, tokens, sequences);
            call.offsets = pointer<const std::int64_t>(offsets);
            call.results = pointer<double>(results);
            call.slopes = pointer<float>(slopes);
            call.through = pointer<bool>(through);
            call.workspace = pointer<double>(workspace);
            call.upstream = pointer<const float>(upstream);
            call.out = pointer<float>(out);
            launch_tokens(logitless_cuda_tokens_backward, call, device, stream);
        },
        py::arg("recipe"), py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("tokens"),
        py::arg("sequences"), py::arg("offsets"), py::arg("results"), py::arg("slopes"), py::arg("through"),
        py::arg("workspace"), py::arg("upstream"), py::arg("out"));
}

void bind(py::module_ module) {
    bind_tokens(module);
    const auto chunk = [](Address z, std::int64_t stride, int type, Address bias, Address outer,
                          std::optional<float> inner, Address floor) {
        return Chunk{pointer<const void>(z), stride, static_cast<Type>(type), pointer<const float>(bias),
                     pointer<const float>(outer), inner.value_or(0.0f), inner.has_value(), pointer<const float>(floor)};
    };
    py::class_<Chunk>(module, "Chunk", py::module_local())
        .def(py::init(chunk), py::kw_only(), py::arg("z"), py::arg("stride"), py::arg("type"), py::arg("bias"),
             py::arg("outer"), py::arg("inner"), py::arg("floor"));
    bind_launcher(module, "statistics", logitless_cuda_statistics);
    bind_launcher(module, "generic", logitless_cuda_generic);
    bind_launcher(module, "gradient", logitless_cuda_gradient);
    bind_launcher(module, "fused", logitless_cuda_fused);
    bind_sinkhorn(module);
    module.def(
        "problem",
        [](int device) -> std::optional<std::string> {
            const int error = logitless_cuda_probe(device);
            return error ? std::optional<std::string>(logitless_cuda_error(error)) : std::nullopt;
        },
        py::arg("device"), "Why these kernels cannot run on that device, or None.");
}

}  // namespace
}  // namespace logitless::cuda
