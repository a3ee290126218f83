// logitless._C: the row kernels for Python. Those for CUDA are in _C.cuda, if it was built with them.

#include "bindings.h"

#include <optional>
#include <tuple>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/token_results.h"
#include "token_recipe.h"
#include "sinkhorn.h"
#include "transport.h"

#if defined(LL_CUDA)
#include "cuda/bindings.h"
#endif

using namespace logitless;

namespace {

// The copies this processor can run, the best first.
const std::vector<const Kernels*>& copies() {
    static const auto found = [] {
        std::vector<const Kernels*> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            found.push_back(&avx512);
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
        found.push_back(&baseline);
        return found;
    }();
    return found;
}

const Kernels* kernels = copies().front();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* copy : copies()) names.push_back(copy->name);
    return names;
}

void force_isa(const std::string& name) {
    for (const Kernels* copy : copies())
        if (name == copy->name) {
            kernels = copy;
            sinkhorn::use(copy->name);
            transport::use(copy->name);
            return;
        }
    throw std::invalid_argument("no copy '" + name + "' that this processor can run");
}

Chunk chunk(Address z, std::int64_t stride, Address bias, Address outer, std::optional<float> inner, Address floor) {
    return {pointer<const float>(z), stride, pointer<const float>(bias), pointer<const float>(outer),
            inner.value_or(0.0f), inner.has_value(), pointer<const float>(floor)};
}

Divergence divergence(const std::string& name, const std::vector<Address>& parameters, Address coefficient) {
    Divergence found = {functor(name), {}, pointer<const float>(coefficient)};
    set_parameters(found.parameters, parameters);
    return found;
}

template <class Call>
void run(void (*kernel)(const Call&, std::int64_t, std::int64_t), const Call& call, std::int64_t rows, int threads) {
    const py::gil_scoped_release unlocked;
    parallel(rows, call.chunks.columns, threads,
             [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
}

void statistics(std::int64_t rows, std::int64_t columns, const Chunk& student, std::optional<Chunk> teacher,
                Address targets, Address weights, const Addresses& accumulators, int threads) {
    const auto out = [&](const char* name) { return pointer<double>(accumulators, name); };
    const Statistics call = {
        {columns, student, teacher.value_or(Chunk{})},
        pointer<const std::int64_t>(targets), pointer<const float>(weights),
        out("max"), out("sum"), out("target"), out("first"), out("square"), out("weighted"),
        out("teacher_max"), out("teacher_sum"), out("forward"), out("reverse"),
        pointer<std::int64_t>(accumulators, "argmax")};
    run(kernels->statistics, call, rows, threads);
}

void generic(std::int64_t rows, std::int64_t columns, const Chunk& student, const Chunk& teacher,
             const Addresses& normalizers, const std::string& name, const std::vector<Address>& parameters,
             Address value, Address slope, int threads) {
    const Generic call = {
        {columns, student, teacher}, normalizers_of(normalizers),
        divergence(name, parameters, 0), pointer<double>(value), pointer<double>(slope)};
    run(kernels->generic, call, rows, threads);
}

using Term = std::tuple<std::string, std::vector<Address>, Address>;  // divergence, parameters, coefficient

void gradient(std::int64_t rows, std::int64_t columns, const Chunk& student, std::optional<Chunk> teacher,
              const Addresses& normalizers, const Addresses& coefficients, const std::vector<Term>& divergences,
              Address targets, Address weights, std::pair<Address, std::int64_t> row_gradients, Address live,
              std::pair<Address, std::int64_t> out, int threads) {
    std::vector<Divergence> terms;
    for (const auto& [name, parameters, coefficient] : divergences)
        terms.push_back(divergence(name, parameters, coefficient));
    const auto of = [&](const char* name) { return pointer<const float>(coefficients, name); };
    const Gradient call = {
        {columns, student, teacher.value_or(Chunk{})}, normalizers_of(normalizers),
        of("one_hot"), of("q"), of("p"), of("weights"), of("q_log_q"), of("q_squared"), of("q_log_ratio"),
        pointer<const std::int64_t>(targets), pointer<const float>(weights),
        terms.data(), static_cast<int>(terms.size()),
        pointer<const float>(row_gradients.first), row_gradients.second, pointer<const bool>(live),
        pointer<float>(out.first), out.second};
    run(kernels->gradient, call, rows, threads);
}

using Input = std::pair<Address, bool>;  // and whether it is per sequence

// Results in the order of Recipe.results.
std::vector<double> tokens(const TokenRecipe& recipe, std::int64_t tokens, std::int64_t sequences,
                           const std::vector<Input>& inputs, Address mask, Address offsets, double denominator,
                           const std::vector<Address>& derivatives, int threads) {
    TokenCall call = {};
    call.recipe = &recipe;
    call.tokens = tokens;
    call.sequences = sequences;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        call.inputs[i] = pointer<const float>(inputs[i].first);
        call.per_sequence[i] = inputs[i].second;
    }
    call.mask = pointer<const bool>(mask);
    call.offsets = pointer<const std::int64_t>(offsets);
    call.wanted = !derivatives.empty();
    for (std::size_t i = 0; i < derivatives.size(); ++i) call.derivatives[i] = pointer<float>(derivatives[i]);

    std::vector<TokenSums> sums(token_units(call));
    {
        const py::gil_scoped_release unlocked;
        parallel(token_units(call), token_unit, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t unit = begin; unit < end; ++unit) kernels->tokens(call, unit, &sums[unit]);
        });
    }
    return token_results(recipe, sums, denominator);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    py::class_<TokenRecipe>(module, "TokenRecipe", py::module_local()).def(py::init(&token_recipe));
    module.def("tokens", &tokens, py::arg("recipe"), py::kw_only(), py::arg("tokens"), py::arg("sequences"),
               py::arg("inputs"), py::arg("mask"), py::arg("offsets"), py::arg("denominator"), py::arg("derivatives"),
               py::arg("threads"));
    py::class_<Chunk>(module, "Chunk", py::module_local())
        .def(py::init(&chunk), py::kw_only(), py::arg("z"), py::arg("stride"), py::arg("bias"), py::arg("outer"),
             py::arg("inner"), py::arg("floor"));
    module.def("statistics", &statistics, py::arg("rows"), py::arg("columns"), py::arg("student"), py::arg("teacher"),
               py::kw_only(), py::arg("targets"), py::arg("weights"), py::arg("accumulators"), py::arg("threads"));
    module.def("generic", &generic, py::arg("rows"), py::arg("columns"), py::arg("student"), py::arg("teacher"),
               py::kw_only(), py::arg("normalizers"), py::arg("divergence"), py::arg("parameters"), py::arg("value"),
               py::arg("slope"), py::arg("threads"));
    module.def("gradient", &gradient, py::arg("rows"), py::arg("columns"), py::arg("student"), py::arg("teacher"),
               py::kw_only(), py::arg("normalizers"), py::arg("coefficients"), py::arg("divergences"),
               py::arg("targets"), py::arg("weights"), py::arg("rows_gradient"), py::arg("live"), py::arg("out"),
               py::arg("threads"));
    module.def("isas", &isas, "The compiled copies this processor can run, the best first.");
    module.def("isa", [] { return kernels->name; }, "The copy in use.");
    module.def("force_isa", &force_isa, py::arg("name"), "Use the copy of that name, in the whole process.");
    sinkhorn::use(kernels->name);
    sinkhorn::bind(module.def_submodule("sinkhorn"));
    transport::use(kernels->name);
    transport::bind(module.def_submodule("transport"));
#if defined(LL_CUDA)
    py::module_ cuda = module.def_submodule("cuda");
    cuda.attr("TokenRecipe") = module.attr("TokenRecipe");
    cuda::bind(cuda);
#endif
}
