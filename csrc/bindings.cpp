// logitless._C: the row kernels for Python. Those for CUDA are in _C.cuda, if it was built with them.

#include "bindings.h"

#include <optional>
#include <tuple>
#include <utility>

#include "copies.h"
#include "cpu/parallel.h"
#include "cpu/token_results.h"
#include "token_recipe.h"

#if defined(LL_CUDA)
#include "cuda/bindings.h"
#endif

using namespace logitless;

namespace {

constexpr InUse<RowKernels> row_kernels;
constexpr InUse<TokenKernels> token_kernels;

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
    run(row_kernels->statistics, call, rows, threads);
}

void generic(std::int64_t rows, std::int64_t columns, const Chunk& student, const Chunk& teacher,
             const Addresses& normalizers, const std::string& name, const std::vector<Address>& parameters,
             Address value, Address slope, int threads) {
    const Generic call = {
        {columns, student, teacher}, normalizers_of(normalizers),
        divergence(name, parameters, 0), pointer<double>(value), pointer<double>(slope)};
    run(row_kernels->generic, call, rows, threads);
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
    run(row_kernels->gradient, call, rows, threads);
}

void floors(std::int64_t rows, std::int64_t columns, const Chunk& student, const std::string& filter, double number,
            Address out, int threads) {
    const Filter kind = filter == "MinP" ? Filter::min_p : filter == "TopP" ? Filter::top_p : Filter::top_k;
    run(row_kernels->floors, Floors{{columns, student, {}}, kind, number, pointer<float>(out)}, rows, threads);
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
            for (std::int64_t unit = begin; unit < end; ++unit) token_kernels->tokens(call, unit, &sums[unit]);
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
    module.def("floors", &floors, py::arg("rows"), py::arg("columns"), py::arg("student"), py::kw_only(),
               py::arg("filter"), py::arg("number"), py::arg("out"), py::arg("threads"));
    module.def("isas", &isas, "The compiled copies this processor can run, the best first.");
    module.def("isa", [] { return isa_names[static_cast<int>(isa)]; }, "The copy in use.");
    module.def("force_isa", &force_isa, py::arg("name"), "Use the copy of that name, in the whole process.");
    sinkhorn::bind(module.def_submodule("sinkhorn"));
    transport::bind(module.def_submodule("transport"));
#if defined(LL_CUDA)
    py::module_ cuda = module.def_submodule("cuda");
    cuda.attr("TokenRecipe") = module.attr("TokenRecipe");
    cuda::bind(cuda);
#endif
}
