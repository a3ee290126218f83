// What the sums of cpu/tokens.h make. Apart from those, since copies for several instruction sets share nothing.

#pragma once

#include <algorithm>
#include <vector>

#include "tokens.h"

namespace logitless {

// What Recipe.results names, from the sums of all units.
inline std::vector<double> token_results(const TokenRecipe& recipe, const std::vector<TokenSums>& units, double given) {
    TokenSums all = {};
    all.least = __builtin_inff();
    all.most = -all.least;
    for (const TokenSums& unit : units) {
        all.tokens += unit.tokens;
        all.sequences += unit.sequences;
        all.policy += unit.policy;
        for (int k = 0; k < recipe.penalty_count; ++k) all.penalties[k] += unit.penalties[k];
        all.low += unit.low;
        all.high += unit.high;
        all.k1 += unit.k1;
        all.k3 += unit.k3;
        all.ratio += unit.ratio;
        all.entropy += unit.entropy;
        all.factor += unit.factor;
        all.kept += unit.kept;
        all.least = std::min(all.least, unit.least);
        all.most = std::max(all.most, unit.most);
    }
    const auto count = [](double n) { return std::max(n, 1.0); };
    const double denominators[] = {1, count(all.tokens), count(all.sequences), given};
    const double norm = recipe.scale / denominators[static_cast<int>(recipe.denominator)], n = count(all.tokens);
    if (all.ratio != all.ratio || !all.tokens) all.least = all.most = static_cast<float>(all.ratio);  // NaN, or 0

    std::vector<double> found = {0, norm * all.policy};
    double loss = all.policy;
    for (int k = 0; k < recipe.penalty_count; ++k) {
        found.push_back(norm * all.penalties[k]);
        loss += recipe.penalties[k].coef * all.penalties[k];
    }
    found[0] = norm * loss;
    found.insert(found.end(), {all.tokens, all.low / n, all.high / n, all.k1 / n, all.k3 / n, all.ratio / n, all.least,
                               all.most, all.entropy / n, all.factor / n, all.kept / n, norm});
    return found;
}

}  // namespace logitless
