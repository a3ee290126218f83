// The token kernel, compiled once per instruction set: value, derivatives and metrics of a policy objective.
//
//   loss / norm = sum_t w_t (S_t + sum_k coef_k P_kt)     math/policy.h has the formulas of every piece
//
// A vector of tokens goes through the whole formula in registers: 4 bytes are read per input, 4 written per derivative,
// and there are two exponentials (ratio, approx_kl_k3) besides those of the pieces, some 20 operations on whole vectors
// each; with comparisons, sums in double and the recipe's branches some 250 for 16 tokens of PPO: 80 ns, where memory
// would need 25. With sums over sequences a sequence is swept twice, for those and for the rest, and where its ratio
// has a derivative a third time, to add that: from the cache unless it is very long.

#include "tokens.h"

#include "simd.h"

namespace logitless {
namespace {

constexpr int width = Vector::size;
constexpr float infinity = __builtin_inff();

struct Sequence {  // or a piece of the tokens, where there are no sequences
    std::int64_t index, begin, end;
    float weight = 1;   // of its tokens: 1 / n with sequence_mean
    float inverse = 1;  // the derivative of its mean or sum by one of its tokens
    float ratio = 0, log_w = 0, factors[TokenRecipe::most_factors] = {};
};

// Some tokens of a sequence, as math/policy.h wants them: what is masked reads as 0.
struct Tokens {
    const TokenCall& call;
    std::int64_t sequence, begin;
    int count;
    Mask live;

    LL_FUNCTION Tokens(const TokenCall& call, const Sequence& of, std::int64_t begin)
        : call(call), sequence(of.index), begin(begin),
          count(of.end - begin < width ? static_cast<int>(of.end - begin) : width),
          live(load_first(call.mask ? call.mask + begin : nullptr, count)) {}

    LL_FUNCTION Vector operator()(int slot) const {
        const float* from = call.inputs[slot];
        return only(call.per_sequence[slot] ? Vector(from[sequence]) : load_first(from + begin, count));
    }
    LL_FUNCTION Vector only(Vector v) const { return select(live, v, Vector(0.0f)); }
};

LL_FUNCTION Dual<Vector> summand(const TokenRecipe& recipe, const Tokens& x) {
    const Vector lp = x(0), old = x(recipe.old);
    return recipe.level == Level::geometric
               ? ratio_summand<Level::geometric>(recipe, advantage<Vector>(recipe, x), lp, old, x)
               : ratio_summand<Level::sequence_mean>(recipe, Vector(0.0f), lp, old, x);
}

// ---------------------------------------------------------------------------------------------- sums over a sequence

// Whether more is summed than tokens are counted.
bool has_sums(const TokenRecipe& recipe, bool vespo) {
    bool found = vespo || sums(recipe.level);
    for (int k = 0; k < recipe.factor_count; ++k) found = found || recipe.factors[k].of_sequence();
    return found;
}

void sum_up(const TokenCall& call, Sequence& of) {
    const TokenRecipe& recipe = *call.recipe;
    const bool vespo = recipe.surrogate == Surrogates::find(Vespo::name), swept = call.mask || has_sums(recipe, vespo);
    if (!swept && !recipe.sequence_mean) return;
    Sum count, ratio, log_w, factors[TokenRecipe::most_factors];
    Vector largest_factors[TokenRecipe::most_factors];
    for (Vector& v : largest_factors) v = Vector(-infinity);

    for (std::int64_t t = of.begin; swept && t < of.end; t += width) {
        const Tokens x(call, of, t);
        count.add(x.only(Vector(1.0f)));
        if (sums(recipe.level)) ratio.add(x.only(summand(recipe, x).value));
        if (vespo) log_w.add(x.only(Vespo::summand(recipe, x(0), x(recipe.old), x)));
        for (int k = 0; k < recipe.factor_count; ++k) {
            if (!recipe.factors[k].of_sequence()) continue;
            const Vector v = factor_summand<Vector>(recipe.factors[k], x);
            if (recipe.factors[k].over == Over::max) {
                largest_factors[k] = max(largest_factors[k], select(x.live, v, Vector(-infinity)));
            } else {
                factors[k].add(x.only(v));
            }
        }
    }

    const double n = swept ? count.total() : static_cast<double>(of.end - of.begin), share = n > 0 ? 1 / n : 1;
    const auto shared = [&](bool mean, const Sum& sum) { return static_cast<float>(sum.total() * (mean ? share : 1)); };
    of.weight = recipe.sequence_mean ? static_cast<float>(share) : 1.0f;
    of.inverse = averages(recipe.level) ? static_cast<float>(share) : 1.0f;
    of.ratio = shared(averages(recipe.level), ratio);
    of.log_w = Vespo::log_weight(shared(false, log_w));
    for (int k = 0; k < recipe.factor_count; ++k) {
        const Over over = recipe.factors[k].over;
        of.factors[k] = over == Over::max ? largest(largest_factors[k]) : shared(over == Over::mean, factors[k]);
    }
}

// ------------------------------------------------------------------------------------------------------------ tokens

struct Totals {
    Sum policy, penalties[TokenRecipe::most_penalties], low, high, k1, k3, ratio, entropy, factor, kept;
    Vector least = Vector(infinity), most = Vector(-infinity);
    double tokens = 0, sequences = 0;

    TokenSums total(const TokenRecipe& recipe) const {
        TokenSums found = {};
        found.tokens = tokens;
        found.sequences = sequences;
        found.policy = policy.total();
        for (int k = 0; k < recipe.penalty_count; ++k) found.penalties[k] = penalties[k].total();
        found.low = low.total();
        found.high = high.total();
        found.k1 = k1.total();
        found.k3 = k3.total();
        found.ratio = ratio.total();
        found.entropy = entropy.total();
        found.factor = factor.total();
        found.kept = kept.total();
        found.least = -largest(-least);
        found.most = largest(most);
        return found;
    }
};

// Values and derivatives of a sequence's tokens; of the ratio's derivative by its sum or mean, what that has in total.
double evaluate(const TokenCall& call, const Sequence& of, Totals& totals) {
    const TokenRecipe& recipe = *call.recipe;
    const Vector zero(0.0f), one(1.0f);
    const bool spread = call.wanted && spreads(recipe.level);
    int places[TokenRecipe::most_penalties];  // of what a penalty is to among the derivatives
    for (int k = 0; k < recipe.penalty_count; ++k) {
        places[k] = -1;
        for (int g = 0; g < recipe.gradient_count; ++g)
            if (recipe.gradients[g] > 0 && recipe.gradients[g] == recipe.penalties[k].other) places[k] = g;
    }
    Sum by_sequence;
    Vector live = zero;

    for (std::int64_t t = of.begin; t < of.end; t += width) {
        const Tokens x(call, of, t);
        live = live + x.only(one);
        const Vector lp = x(0), old = x(recipe.old), a = advantage<Vector>(recipe, x), d = lp - old;

        SurrogateValue<Vector> surrogate = logitless::by_lp(zero, lp);
        Vector rho;
        {
            const Vector r = sums(recipe.level) ? Vector(of.ratio) : anchored(recipe, lp, old, x);
            const bool geometric = recipe.level == Level::geometric;
            const Dual<Vector> l =
                geometric ? log_ratio<Level::geometric>(recipe, r) : log_ratio<Level::token>(recipe, r);
            const SurrogateInputs<Vector> inputs = {a, lp, old, capped_exp(l), Vector(of.log_w)};
            rho = inputs.rho.value;
            Surrogates::visit(recipe.surrogate, recipe, [&](auto chosen) { surrogate = chosen.at(inputs); });
            if (geometric) {
                const Cut<Vector> was = cut(recipe, a, d);
                surrogate.low = surrogate.low | was.low;
                surrogate.high = surrogate.high | was.high;
            }
        }

        Vector w = x.only(Vector(of.weight));
        if (recipe.weights >= 0) w = w * x(recipe.weights);
        if (recipe.factor_count) {
            Vector product = one;
            for (int k = 0; k < recipe.factor_count; ++k) {
                const TokenFactor& f = recipe.factors[k];
                const Vector v = f.of_sequence() ? Vector(of.factors[k]) : factor_summand<Vector>(f, x);
                product = product * factor(f, v, a, x);
            }
            totals.factor.add(x.only(product));
            totals.kept.add(x.only(select(product == zero, zero, one)));
            surrogate.value = times(product, surrogate.value);
            surrogate.by_ratio = times(product, surrogate.by_ratio);
            surrogate.by_lp = times(product, surrogate.by_lp);
        }
        totals.policy.add(times(w, surrogate.value));

        Vector slopes[TokenRecipe::most_gradients];
        for (int g = 0; g < recipe.gradient_count; ++g) slopes[g] = zero;
        Vector by_lp = surrogate.by_lp;
        if (spread) {
            by_sequence.add(times(w, surrogate.by_ratio));
        } else {
            by_lp = by_lp + surrogate.by_ratio;
        }
        for (int k = 0; k < recipe.penalty_count; ++k) {
            const PenaltyValue<Vector> p = penalty(recipe.penalties[k], lp, old, x);
            totals.penalties[k].add(times(w, p.value));
            const Vector coef(recipe.penalties[k].coef);
            by_lp = by_lp + coef * p.by_lp;
            if (places[k] >= 0) slopes[places[k]] = slopes[places[k]] + coef * p.by_other;
        }
        if (call.wanted)
            for (int g = 0; g < recipe.gradient_count; ++g)
                store_first(times(w, recipe.gradients[g] ? slopes[g] : by_lp), call.derivatives[g] + t, x.count);

        totals.low.add(x.only(select(surrogate.low, one, zero)));
        totals.high.add(x.only(select(surrogate.high, one, zero)));
        totals.k1.add(-d);
        totals.k3.add(capped_expm1(d).value - d);
        totals.ratio.add(x.only(rho));
        totals.least = min(totals.least, select(x.live, rho, Vector(infinity)));
        totals.most = max(totals.most, select(x.live, rho, Vector(-infinity)));
        if (recipe.entropy >= 0) totals.entropy.add(x(recipe.entropy));
    }
    Sum count;
    count.add(live);
    totals.tokens += count.total();
    totals.sequences += count.total() > 0;
    return by_sequence.total();
}

// Adds the derivative of a sequence's ratio to that of its tokens.
void spread(const TokenCall& call, const Sequence& of, float derivative) {
    const TokenRecipe& recipe = *call.recipe;
    float* to = nullptr;
    for (int g = 0; g < recipe.gradient_count; ++g)
        if (recipe.gradients[g] == 0) to = call.derivatives[g];
    if (!to) return;
    for (std::int64_t t = of.begin; t < of.end; t += width) {
        const Tokens x(call, of, t);
        const Vector slope = recipe.level == Level::geometric ? summand(recipe, x).slope : Vector(1.0f);
        store_first(load_first(to + t, x.count) + x.only(Vector(derivative) * slope), to + t, x.count);
    }
}

// ------------------------------------------------------------------------------------------------------------- units

// The first sequence that begins at a token or after it.
std::int64_t first_from(const TokenCall& call, std::int64_t token) {
    std::int64_t low = 0, high = call.sequences;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (call.offsets[middle] < token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

void tokens(const TokenCall& call, std::int64_t unit, TokenSums* found) {
    const TokenRecipe& recipe = *call.recipe;
    const std::int64_t begin = unit * token_unit;
    Totals totals;
    if (!call.offsets) {
        const std::int64_t end = call.tokens - begin < token_unit ? call.tokens : begin + token_unit;
        evaluate(call, Sequence{0, begin, end}, totals);
    } else {
        const std::int64_t last = first_from(call, begin + token_unit);
        for (std::int64_t i = first_from(call, begin); i < last; ++i) {
            Sequence of{i, call.offsets[i], call.offsets[i + 1]};
            sum_up(call, of);
            const double derivative = evaluate(call, of, totals);
            if (call.wanted && spreads(recipe.level)) spread(call, of, static_cast<float>(derivative * of.inverse));
        }
    }
    *found = totals.total(recipe);
}

constexpr TokenKernels kernels = {tokens};

}  // namespace

const TokenKernels TokenKernels::LL_COPY = kernels;

}  // namespace logitless
