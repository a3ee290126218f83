// Policy objectives token by token: the C++ statement of python/logitless/ops/tokens/recipe.py.
//
// Every piece gives a value and its derivatives. Beyond the exponent 80 e^x is constant, a clamp passes the derivative
// at its bounds, a maximum halves it between equal arguments: as the torch expression does. Inputs come as a function
// x(slot) -> T; what is chosen by a number in the recipe is the same for all tokens of a call.

#pragma once

#include "elementary.h"
#include "list.h"

namespace logitless {

// ------------------------------------------------------------------------------------------------------- the recipe

enum class Level { token, sequence_mean, sequence_sum, sequence_token, geometric };
constexpr const char* level_names[] = {"token", "sequence-mean", "sequence-sum", "sequence-token", "geometric"};

enum class Estimate {
    k1, abs, k2, k3, k1_through, k3_through, rapo, dph_forward_kl, dph_js, dph_alpha, ratio_k3, input, nll
};
constexpr const char* estimate_names[] = {"k1", "abs", "k2", "k3", "k1+", "k3+", "rapo", "dph_forward_kl", "dph_js",
                                          "dph_alpha", "ratio_k3", "input", "nll"};

enum class FactorKind {
    input, only, none_of, at_least, importance, rejection_k1, rejection_k2, rejection_k3, opsm
};
constexpr const char* factor_names[] = {"input", "only", "not", "at_least", "importance",
                                        "rejection_k1", "rejection_k2", "rejection_k3", "opsm"};

enum class Over { token, sum, mean, max };
constexpr const char* over_names[] = {"token", "sum", "mean", "max"};

enum class Denominator { none, tokens, sequences, given };
constexpr const char* denominator_names[] = {"none", "tokens", "sequences", "given"};

struct TokenReward {
    float coef;
    int plus, minus;
};

struct TokenPenalty {
    Estimate estimate;
    float coef;
    int other, weights, keep;  // slots, -1 where not given; here and below
    float largest, largest_value, alpha;
};

struct TokenFactor {
    FactorKind kind;
    int first, rollout;
    Over over;  // of opsm: mean
    bool masked;
    float low, high, bound;

    LL_FUNCTION bool of_sequence() const { return over != Over::token; }
};

struct TokenRecipe {
    static constexpr int most_slots = 24, most_gradients = 8, most_rewards = 4, most_penalties = 8, most_factors = 8;

    int slots, gradient_count, reward_count, penalty_count, factor_count;
    int gradients[most_gradients];
    int old, advantages, teacher, rollout, weights, entropy;
    Level level;
    float share, rest, low, high;  // of the ratio; rest = 1 - share
    int surrogate;           // number in Surrogates
    float parameters[4];     // as the surrogate's functor names them
    bool sequence_mean;
    Denominator denominator;
    double scale;
    TokenReward rewards[most_rewards];
    TokenPenalty penalties[most_penalties];
    TokenFactor factors[most_factors];
};

namespace {

// ---------------------------------------------------------------------------------------------- numbers with a slope

template <class T>
using MaskOf = decltype(T(0.0f) > T(0.0f));

constexpr float largest_log = 80.0f;

template <class T>
struct Dual {
    T value, slope;
};

template <class T>
LL_FUNCTION T clamp(T x, T low, T high) {
    return min(high, max(low, x));
}

template <class T>
LL_FUNCTION Dual<T> clamp(Dual<T> x, T low, T high) {
    return {clamp(x.value, low, high), select((low > x.value) | (x.value > high), T(0.0f), x.slope)};
}

template <class T>
LL_FUNCTION Dual<T> times(T factor, Dual<T> x) {
    return {factor * x.value, factor * x.slope};
}

template <class T>
LL_FUNCTION T capped_exp(T x) {
    return exp(min(T(largest_log), x));
}

template <class T>
LL_FUNCTION Dual<T> capped_exp(Dual<T> x) {
    const T e = capped_exp(x.value);
    return {e, select(x.value > T(largest_log), T(0.0f), e * x.slope)};
}

// e^x - 1, and its derivative less 1, which keeps the digits near 0.
template <class T>
struct Expm1 {
    T value, slope_less_1;
};

template <class T>
LL_FUNCTION Expm1<T> capped_expm1(T x) {
    const T value = expm1(min(T(largest_log), x));
    return {value, select(x > T(largest_log), T(-1.0f), value)};
}

// ------------------------------------------------------------------------------------------------- rewards and ratios

template <class T, class Inputs>
LL_FUNCTION T advantage(const TokenRecipe& recipe, const Inputs& x) {
    T added(0.0f);
    for (int k = 0; k < recipe.reward_count; ++k) {
        const TokenReward& reward = recipe.rewards[k];
        added = added + T(reward.coef) * (x(reward.plus) - x(reward.minus));
    }
    return recipe.advantages < 0 ? added : recipe.reward_count ? x(recipe.advantages) + added : x(recipe.advantages);
}

// r_t = lp - (1 - share) old - share teacher; its derivative is 1.
template <class T, class Inputs>
LL_FUNCTION T anchored(const TokenRecipe& recipe, T lp, T old, const Inputs& x) {
    if (recipe.teacher < 0) return lp - old;
    return lp - (T(recipe.rest) * old + T(recipe.share) * x(recipe.teacher));
}

// c_t of GMPO, and where it was cut.
template <class T>
struct Cut {
    Dual<T> c;
    MaskOf<T> low, high;
};

template <class T>
LL_FUNCTION Cut<T> cut(const TokenRecipe& recipe, T a, T r) {
    const T high(recipe.high), low(-recipe.low), zero(0.0f);
    const auto up = a > zero, down = zero > a;
    const MaskOf<T> too_low = down & (low > r), too_high = up & (r > high);
    const T c = select(up, min(high, r), select(down, max(low, r), zero));
    const auto through = (up | down) & !(too_low | too_high);
    return {{c, select(through, T(1.0f), zero)}, too_low, too_high};
}

// What is summed over a sequence for its ratio, with the derivative by lp.
template <Level level, class T, class Inputs>
LL_FUNCTION Dual<T> ratio_summand(const TokenRecipe& recipe, T a, T lp, T old, const Inputs& x) {
    if (level == Level::geometric) return cut(recipe, a, lp - old).c;
    return {anchored(recipe, lp, old, x), T(1.0f)};
}

// Whether the ratio's derivative runs back through the sum, to every token of the sequence.
constexpr LL_FUNCTION bool spreads(Level level) { return level != Level::token && level != Level::sequence_token; }

// Whether there is a sum, and whether it is divided by the number of tokens.
constexpr LL_FUNCTION bool sums(Level level) { return level != Level::token; }
constexpr LL_FUNCTION bool averages(Level level) { return sums(level) && level != Level::sequence_sum; }

// l from r_t or from what the sequence's sum gave, with the derivative by that.
template <Level level, class T>
LL_FUNCTION Dual<T> log_ratio(const TokenRecipe& recipe, T r) {
    const float infinity = __builtin_inff();
    const bool bounded = recipe.low > -infinity || recipe.high < infinity;
    if (level == Level::geometric || !bounded) return {r, T(1.0f)};  // geometric: bounded already
    return clamp(Dual<T>{r, T(1.0f)}, T(recipe.low), T(recipe.high));
}

// --------------------------------------------------------------------------------------------------------- surrogates

template <class T>
struct SurrogateInputs {
    T a, lp, old;
    Dual<T> rho;  // e^l and its derivative by what l is clamped from
    T log_w;      // of Vespo
};

template <class T>
struct SurrogateValue {
    T value, by_ratio, by_lp;  // derivatives by what l is clamped from and, apart from that, by lp
    MaskOf<T> low, high;       // where the derivative is cut or reduced since the ratio is too low, too high
};

template <class T>
LL_FUNCTION SurrogateValue<T> by_ratio(Dual<T> loss) {
    const auto none = T(0.0f) > T(0.0f);
    return {loss.value, loss.slope, T(0.0f), none, none};
}

template <class T>
LL_FUNCTION SurrogateValue<T> by_lp(T slope, T lp) {
    const auto none = T(0.0f) > T(0.0f);
    return {slope * lp, T(0.0f), slope, none, none};
}

// max(-A min(rho, delta), -A clip(rho)), of negative A at most -A dual
struct Clip {
    static constexpr const char* name = "clip";
    static constexpr int parameters = 4;
    float least, most, dual, delta;  // 1 - low, 1 + high, ...

    LL_FUNCTION explicit Clip(const TokenRecipe& of)
        : least(of.parameters[0]), most(of.parameters[1]), dual(of.parameters[2]), delta(of.parameters[3]) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        const T zero(0.0f), rho = t.rho.value;
        const auto up = t.a > zero, down = zero > t.a;
        const T bound(dual < delta ? dual : delta);
        SurrogateValue<T> found = by_ratio(Dual<T>{
            max(-t.a * min(T(delta), rho), -t.a * clamp(rho, T(least), T(most))), -t.a * t.rho.slope});
        found.low = down & (T(least) > rho);
        found.high = (up & (rho > T(most))) | (down & (rho > bound));
        found.by_ratio = select(found.low | found.high, zero, found.by_ratio);
        if (dual < __builtin_inff()) {
            const T most_loss = -t.a * T(dual);
            found.by_ratio = select(down & (found.value == most_loss), T(0.5f) * found.by_ratio, found.by_ratio);
            found.value = select(down, min(most_loss, found.value), found.value);
        }
        return found;
    }
};

// -A rho
struct Importance {
    static constexpr const char* name = "importance";
    static constexpr int parameters = 0;

    LL_FUNCTION explicit Importance(const TokenRecipe&) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        return by_ratio(times(-t.a, t.rho));
    }
};

// -A lp
struct Reinforce {
    static constexpr const char* name = "reinforce";
    static constexpr int parameters = 0;

    LL_FUNCTION explicit Reinforce(const TokenRecipe&) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        return by_lp(-t.a, t.lp);
    }
};

// -sg(clip(rho, low, high)) A lp
struct Cispo {
    static constexpr const char* name = "cispo";
    static constexpr int parameters = 2;
    float low, high;

    LL_FUNCTION explicit Cispo(const TokenRecipe& of) : low(of.parameters[0]), high(of.parameters[1]) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        SurrogateValue<T> found = by_lp(-clamp(t.rho.value, T(low), T(high)) * t.a, t.lp);
        found.low = T(low) > t.rho.value;
        found.high = t.rho.value > T(high);
        return found;
    }
};

// -A sigmoid(tau (rho - 1)) 4 / tau
struct Sapo {
    static constexpr const char* name = "sapo";
    static constexpr int parameters = 2;
    float tau_pos, tau_neg;

    LL_FUNCTION explicit Sapo(const TokenRecipe& of) : tau_pos(of.parameters[0]), tau_neg(of.parameters[1]) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        const T one(1.0f), tau = select(t.a > T(0.0f), T(tau_pos), T(tau_neg));
        const T y = tau * (t.rho.value - one);
        const T e = exp(-abs(y)), whole = one / (one + e);
        const T sigmoid = select(y > T(0.0f), whole, e * whole), slope = (e * whole) * whole;
        return by_ratio(Dual<T>{-sigmoid * (T(4.0f) / tau) * t.a, T(-4.0f) * slope * t.rho.slope * t.a});
    }
};

// -sg(e^(lam + k log w - lam w)) A lp
struct Vespo {
    static constexpr const char* name = "vespo";
    static constexpr int parameters = 4;
    static constexpr float least = -18.420680743952367f;  // log 1e-8
    float k_pos, lam_pos, k_neg, lam_neg;

    LL_FUNCTION explicit Vespo(const TokenRecipe& of)
        : k_pos(of.parameters[0]), lam_pos(of.parameters[1]), k_neg(of.parameters[2]), lam_neg(of.parameters[3]) {}

    // log w is the sum of these over the sequence, clamped.
    template <class T, class Inputs>
    static LL_FUNCTION T summand(const TokenRecipe& recipe, T lp, T old, const Inputs& x) {
        const T own = clamp(lp - old, T(-20.0f), T(20.0f));
        return recipe.rollout < 0 ? own : own + clamp(old - x(recipe.rollout), T(least), T(20.0f));
    }
    static LL_FUNCTION float log_weight(float sum) { return clamp(sum, least, 20.0f); }

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        const auto down = T(0.0f) > t.a;
        const T k = select(down, T(k_neg), T(k_pos)), lam = select(down, T(lam_neg), T(lam_pos));
        return by_lp(-capped_exp(lam + k * t.log_w - lam * capped_exp(t.log_w)) * t.a, t.lp);
    }
};

// -(A lp - beta/2 (lp - old)^2)
struct Dro {
    static constexpr const char* name = "dro";
    static constexpr int parameters = 1;
    float beta;

    LL_FUNCTION explicit Dro(const TokenRecipe& of) : beta(of.parameters[0]) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        const T d = t.lp - t.old, pull = T(beta) * d;
        SurrogateValue<T> found = by_lp(pull - t.a, t.lp);
        found.value = -(t.a * t.lp - T(0.5f) * pull * d);
        return found;
    }
};

// Where the sampled token's probability has moved too far: p - p_old ("tv"), or the binary KL.
template <class T>
struct Moved {
    MaskOf<T> low, high;
};

struct TotalVariation {
    static constexpr const char *name = "dppo_tv", *ratio_name = "dppo_tv_ratio";

    template <class T>
    static LL_FUNCTION Moved<T> moved(const SurrogateInputs<T>& t, float low, float high) {
        const auto up = t.a > T(0.0f);
        const T change = exp(t.lp) - exp(t.old);
        const MaskOf<T> too_low = (!up) & (T(-low) > change), too_high = up & (change > T(high));
        return {too_low, too_high};
    }
};

struct BinaryKl {
    static constexpr const char *name = "dppo_kl", *ratio_name = "dppo_kl_ratio";

    template <class T>
    static LL_FUNCTION T rest(T lp) {  // log(1 - e^lp), finite at lp = 0
        return log(max(T(0x1p-126f), -expm1(lp)));
    }
    template <class T>
    static LL_FUNCTION Moved<T> moved(const SurrogateInputs<T>& t, float low, float high) {
        const auto up = t.a > T(0.0f);
        const T p = exp(t.lp), p_old = exp(t.old);
        const T kl = p_old * (t.old - t.lp) + (T(1.0f) - p_old) * (rest(t.old) - rest(t.lp));
        const MaskOf<T> too_low = (!up) & (kl > T(low)) & (p_old > p), too_high = up & (kl > T(high)) & (p > p_old);
        return {too_low, too_high};
    }
};

// -keep A sg(min(rho, cap)) lp, or -keep A rho
template <class Divergence, bool detached>
struct Dppo {
    static constexpr const char* name = detached ? Divergence::name : Divergence::ratio_name;
    static constexpr int parameters = detached ? 3 : 2;
    float low, high, cap;

    LL_FUNCTION explicit Dppo(const TokenRecipe& of)
        : low(of.parameters[0]), high(of.parameters[1]), cap(of.parameters[2]) {}

    template <class T>
    LL_FUNCTION SurrogateValue<T> at(const SurrogateInputs<T>& t) const {
        const Moved<T> moved = Divergence::moved(t, low, high);
        const T kept = select(moved.low | moved.high, T(0.0f), -t.a);
        SurrogateValue<T> found =
            detached ? by_lp(kept * min(T(cap), t.rho.value), t.lp) : by_ratio(times(kept, t.rho));
        found.low = moved.low;
        found.high = moved.high;
        return found;
    }
};

using Surrogates = List<Clip, Importance, Reinforce, Cispo, Sapo, Vespo, Dro, Dppo<TotalVariation, true>,
                        Dppo<BinaryKl, true>, Dppo<TotalVariation, false>, Dppo<BinaryKl, false>>;

// ---------------------------------------------------------------------------------------------------------- penalties

// Of d = lp - other; for ratio_k3, see below.
template <class T>
LL_FUNCTION Dual<T> estimate(Estimate name, T d, float alpha) {
    const T one(1.0f), zero(0.0f), half(0.5f), last(largest_log);
    switch (name) {
        case Estimate::k1: return {d, one};
        case Estimate::abs: return {abs(d), select(d > zero, one, select(zero > d, -one, zero))};
        case Estimate::k2: return {d * d * half, d};
        case Estimate::k1_through: return {d, d};
        case Estimate::k3:
        case Estimate::k3_through:
        case Estimate::ratio_k3: {
            const Expm1<T> w = capped_expm1(-d);
            return {w.value + d, name == Estimate::k3_through ? d : -w.slope_less_1};
        }
        case Estimate::rapo: {
            const T w = capped_exp(-d);
            return {-d * w - capped_expm1(-d).value, select(-d > last, -w, d * w)};
        }
        case Estimate::dph_forward_kl: {
            const Expm1<T> u = capped_expm1(d);
            return {u.value - d, u.slope_less_1};
        }
        case Estimate::dph_js: {
            const T u = capped_exp(d), log_mean = log1p(half * capped_expm1(d).value);
            return {u * (d - log_mean) - log_mean, select(d > last, u, u * (d - log_mean))};
        }
        case Estimate::dph_alpha: {
            const float rest = 1.0f - alpha;
            const Expm1<T> u = capped_expm1(d), v = capped_expm1(T(rest) * d);
            return {fma(T(-rest), u.value, v.value) * T(-1.0f / (alpha * rest)),
                    (u.slope_less_1 - v.slope_less_1) * T(1.0f / alpha)};
        }
        case Estimate::input:
        case Estimate::nll: break;
    }
    return {zero, zero};
}

template <class T>
struct PenaltyValue {
    T value, by_lp, by_other;
};

template <class T, class Inputs>
LL_FUNCTION PenaltyValue<T> penalty(const TokenPenalty& of, T lp, T old, const Inputs& x) {
    const T zero(0.0f), one(1.0f);
    const bool input = of.estimate == Estimate::input, nll = of.estimate == Estimate::nll;
    Dual<T> d = {input ? x(of.other) : nll ? lp : lp - x(of.other), one};
    if (of.keep >= 0) {
        const auto dropped = x(of.keep) == zero;
        d = {select(dropped, zero, d.value), select(dropped, zero, one)};
    }
    const float infinity = __builtin_inff();
    if (of.largest < infinity) d = clamp(d, T(-of.largest), T(of.largest));
    T value, by_lp, by_other;
    if (input || nll) {
        value = nll ? -d.value : d.value;
        by_lp = nll ? -d.slope : zero;
        by_other = input ? d.slope : zero;
    } else {
        const Dual<T> k = estimate(of.estimate, d.value, of.alpha);
        value = k.value;
        by_lp = k.slope * d.slope;
        by_other = -by_lp;
        if (of.estimate == Estimate::ratio_k3) {
            const T log_rho = lp - old;
            const Dual<T> rho = capped_exp(Dual<T>{log_rho, one});
            const auto plain = !((d.slope == zero) | (-d.value > T(largest_log)) | (log_rho > T(largest_log)));
            value = rho.value * k.value;
            by_other = rho.value * by_other;
            by_lp = select(plain, rho.value * d.value, rho.slope * k.value - by_other);  // the former loses no digits
        }
    }
    if (of.largest_value < infinity) {
        const T most(of.largest_value);
        const auto outside = (-most > value) | (value > most);
        value = clamp(value, -most, most);
        by_lp = select(outside, zero, by_lp);
        by_other = select(outside, zero, by_other);
    }
    if (of.weights < 0) return {value, by_lp, by_other};
    const T weight = x(of.weights);
    return {weight * value, weight * by_lp, weight * by_other};
}

// ------------------------------------------------------------------------------------------------------------ factors

// v of a token: what is held against the bounds, or summed over the sequence first (or its maximum taken).
template <class T, class Inputs>
LL_FUNCTION T factor_summand(const TokenFactor& of, const Inputs& x) {
    if (of.rollout < 0) return T(0.0f);
    const T u = x(of.first) - x(of.rollout);
    switch (of.kind) {
        case FactorKind::importance: return u;
        case FactorKind::rejection_k2: return u * u * T(0.5f);
        case FactorKind::rejection_k3: return capped_expm1(u).value - u;
        default: return -u;
    }
}

// The factor from v, the token's own or the sequence's.
template <class T, class Inputs>
LL_FUNCTION T factor(const TokenFactor& of, T v, T a, const Inputs& x) {
    const T one(1.0f), zero(0.0f), low(of.low), high(of.high);
    switch (of.kind) {
        case FactorKind::input: return x(of.first);
        case FactorKind::only: return select(x(of.first) == zero, zero, one);
        case FactorKind::none_of: return select(x(of.first) == zero, one, zero);
        case FactorKind::at_least: return select((x(of.first) > low) | (x(of.first) == low), one, zero);
        case FactorKind::importance: {
            const T w = capped_exp(clamp(v, T(-of.bound), T(of.bound)));
            return of.masked ? select((low > w) | (w > high), zero, w) : clamp(w, low, high);
        }
        case FactorKind::opsm: return select((a > zero) | (a == zero) | (high > v) | (high == v), one, zero);
        default: return select(((v > low) | (v == low)) & ((high > v) | (high == v)), one, zero);
    }
}

}  // namespace
}  // namespace logitless
