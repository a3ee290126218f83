// math/policy.h's TokenRecipe from the Recipe of python/logitless/ops/tokens/recipe.py.

#pragma once

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "math/policy.h"

namespace logitless {
namespace {

template <class T>
T get(const py::handle& of, const char* name) {
    return of.attr(name).cast<T>();
}
template <class Enum, std::size_t size>
Enum get(const py::handle& of, const char* name, const char* const (&names)[size]) {
    return number<Enum>(names, get<std::string>(of, name));
}

// Calls fill(element, item) for every item of a tuple; how many there were.
template <class T, std::size_t size, class Fill>
int fill(T (&array)[size], const py::handle& items, Fill fill) {
    std::size_t count = 0;
    for (const py::handle& item : items) {
        if (count == size) throw std::invalid_argument("a token recipe larger than csrc/math/policy.h has room for");
        fill(array[count++], item);
    }
    return static_cast<int>(count);
}

inline TokenRecipe token_recipe(const py::handle& of) {
    TokenRecipe recipe = {};
    recipe.slots = static_cast<int>(py::len(of.attr("inputs")));
    if (recipe.slots > TokenRecipe::most_slots) throw std::invalid_argument("a token recipe with too many inputs");
    recipe.gradient_count =
        fill(recipe.gradients, of.attr("gradients"), [](int& to, const py::handle& slot) { to = slot.cast<int>(); });
    recipe.old = get<int>(of, "old");
    recipe.advantages = get<int>(of, "advantages");
    recipe.weights = get<int>(of, "weights");
    recipe.entropy = get<int>(of, "entropy");
    recipe.sequence_mean = get<bool>(of, "sequence_mean");
    recipe.denominator = get<Denominator>(of, "denominator", denominator_names);
    recipe.scale = get<double>(of, "scale");

    const py::object ratio = of.attr("ratio");
    recipe.level = get<Level>(ratio, "level", level_names);
    recipe.teacher = get<int>(ratio, "teacher");
    recipe.share = get<float>(ratio, "share");
    recipe.rest = static_cast<float>(1 - get<double>(ratio, "share"));
    recipe.low = get<float>(ratio, "low");
    recipe.high = get<float>(ratio, "high");

    const py::object surrogate = of.attr("surrogate");
    const std::string name = get<std::string>(surrogate, "name");
    recipe.surrogate = Surrogates::find(name.c_str());
    if (recipe.surrogate < 0) throw std::invalid_argument("'" + name + "' is not known to csrc/math/policy.h");
    recipe.rollout = get<int>(surrogate, "rollout");
    const int count = fill(recipe.parameters, surrogate.attr("parameters"),
                           [](float& to, const py::handle& x) { to = x.cast<float>(); });
    if (count != Surrogates::parameters(recipe.surrogate))
        throw std::invalid_argument("'" + name + "' with " + std::to_string(count) + " parameters");
    if (name == Clip::name) {
        const py::tuple given = surrogate.attr("parameters");
        recipe.parameters[0] = static_cast<float>(1 - given[0].cast<double>());
        recipe.parameters[1] = static_cast<float>(1 + given[1].cast<double>());
    }

    recipe.reward_count = fill(recipe.rewards, of.attr("rewards"), [](TokenReward& to, const py::handle& reward) {
        to = {get<float>(reward, "coef"), get<int>(reward, "plus"), get<int>(reward, "minus")};
    });
    recipe.penalty_count = fill(recipe.penalties, of.attr("penalties"), [](TokenPenalty& to, const py::handle& p) {
        to = {get<Estimate>(p, "name", estimate_names), get<float>(p, "coef"), get<int>(p, "other"),
              get<int>(p, "weights"), get<int>(p, "keep"), get<float>(p, "largest"), get<float>(p, "largest_value"),
              get<float>(p, "alpha")};
    });
    recipe.factor_count = fill(recipe.factors, of.attr("factors"), [](TokenFactor& to, const py::handle& f) {
        to = {get<FactorKind>(f, "name", factor_names), get<int>(f, "first"), get<int>(f, "rollout"),
              get<Over>(f, "over", over_names), get<bool>(f, "masked"), get<float>(f, "low"),
              get<float>(f, "high"), get<float>(f, "bound")};
        if (to.kind == FactorKind::opsm) to.over = Over::mean;
    });
    return recipe;
}

}  // namespace
}  // namespace logitless
