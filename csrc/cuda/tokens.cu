// Policy objectives token by token: value, derivatives and metrics in one launch (math/policy.h has the formulas).
//
//   values      loss = norm sum_t w_t (S_t + sum_k coef_k P_kt), metrics, w_t d(...)/dx_t without norm
//   sums        first, where a token's value takes sums over its sequence: n, sum r, sum of factors' v, ...
//   backward    upstream norm (slope_t + what runs back through the sequence's ratio)
//
// Traffic per token: values reads 4 bytes an input and 1 of the mask and writes 4 a gradient (and 1 where the ratio is
// the sequence's); sums reads what is summed, which values finds in the L2 cache then. 1M tokens with five inputs on an
// H100 at 2.9 TB/s: 25 MB, 8.7 us, and as much arithmetic beside it, some 170 instructions a token (clip, a k3 penalty
// and the metrics); with the start and the last block 13 us. sums 5 us, backward 5 us.
//
// A warp takes a chunk of adjacent tokens, as many as there are warps for (one wave), in strips of 128: all inputs of a
// strip go to shared memory at once, asynchronously, in 16 bytes where they are aligned, and are read there by slot
// number. A thread works on four tokens at a time (four.cuh), so that what a recipe chooses, branches that are the same
// for all tokens, costs little: one instance has all surrogates and needs no more registers than the largest of eleven.
//
// A chunk falls into pieces, one for each sequence that has tokens there. What is summed over a sequence is summed over
// each piece, and whoever needs it adds up the pieces: that of chunk c and sequence i is number c + i, which no other
// is, and those of one sequence are adjacent. So sequences are as long or as short as they like, and nothing about them
// need be known before the launch. (Many of a few tokens are slow: a warp takes them one after the other.)
//
// Results are added in a fixed order: a thread's tokens, a warp, a block, and the blocks by the one that finishes last,
// which a ticket tells, an integer that wraps to 0.

#include "tokens.h"

#include "four.cuh"
#include "launch.cuh"

namespace logitless::cuda {
namespace {

constexpr int token_threads = 256, token_warps = token_threads / warp_size, token_blocks = 2;  // of a processor
constexpr int strip = four * warp_size;  // tokens of a warp that are on their way at once

// What is added up over all tokens; of penalties one each.
struct Total {
    enum { tokens, low, high, k1, k3, ratio, least, largest, entropy, factor, kept, sequences, policy, penalties };
    static constexpr int most = penalties + TokenRecipe::most_penalties;
};

// What is added up over a sequence; of factors one each.
struct SequenceSum {
    enum { tokens, ratio, log_weight, factors };
};

struct Plan {
    TokenCall call;
    int chunk, chunks, blocks;              // of this many tokens; blocks for them all
    bool pieces;                            // a sequence's tokens must be told from another's
    bool summed, vespo;                     // `sums` comes first; it adds up log w
    unsigned slots, summed_slots, vectors;  // bits: all, what `sums` reads, those whose tokens 4 n are aligned
    double* totals;                         // [Total::most, blocks]
    double* sums;                           // [pieces, sum_count()]
    double* slopes;                         // [pieces]: what runs back to each token that the ratio depends on

    __host__ __device__ int sum_count() const { return SequenceSum::factors + call.recipe.factor_count; }
};

// ------------------------------------------------------------------------------------------------------ shared memory

struct Shared {
    double warps[Total::most][token_warps];
    double total[Total::most];
    bool last;  // of the blocks
};

// What a thread has there. Its numbers are in shared memory since they are indexed; nobody else looks at them.
struct Warp {
    int lane, index;
    float* held;      // [slots + gradients, strip] of the warp, of which this thread's tokens are at `lane`
    double* numbers;  // at k * token_threads: sums of penalties, then v of the sequence's factors
};

constexpr std::size_t shared_head = (sizeof(Shared) + 15) / 16 * 16;

__host__ __device__ __forceinline__ int held_by_warp(const TokenRecipe& recipe) {
    return strip * (recipe.slots + recipe.gradient_count);
}

__host__ __device__ __forceinline__ int numbers_of_thread(const TokenRecipe& recipe) {
    return recipe.penalty_count + recipe.factor_count;
}

__device__ __forceinline__ Warp this_warp(const TokenRecipe& recipe, unsigned char* memory) {
    double* const numbers = reinterpret_cast<double*>(memory + shared_head);
    Warp warp;
    warp.lane = threadIdx.x % warp_size;
    warp.index = threadIdx.x / warp_size;
    warp.numbers = numbers + threadIdx.x;
    warp.held = reinterpret_cast<float*>(numbers + token_threads * numbers_of_thread(recipe)) +
                warp.index * held_by_warp(recipe);
    return warp;
}

template <class Op, class T>
__device__ __forceinline__ T of_warp(T value) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2)
        value = Op::of(value, __shfl_xor_sync(~0u, value, distance));
    return value;
}

// ------------------------------------------------------------------------------------------------------------- pieces

struct Piece {
    int sequence, begin, end;
    bool dead;  // behind the last sequence
};

__device__ __forceinline__ int offset(const TokenCall& call, int i) {
    const std::int64_t at = call.offsets[i], most = call.tokens;
    return static_cast<int>(at < 0 ? 0 : at < most ? at : most);
}

// The first sequence that ends behind `token`, or their number. All lanes look at once.
__device__ __forceinline__ int sequence_of(const TokenCall& call, int token, int lane) {
    int low = 0, high = static_cast<int>(call.sequences);
    while (low < high) {
        const int step = (high - low + warp_size - 1) / warp_size, mine = low + (lane + 1) * step - 1;
        const bool before = mine < high && offset(call, mine + 1) <= token;
        low += step * __popc(__ballot_sync(~0u, before));
        high = step == 1 ? low : ::min(low + step - 1, high);
    }
    return low;
}

// Calls body for the pieces of this warp's chunk, in order.
template <class Body>
__device__ __forceinline__ void each_piece(const Plan& plan, int chunk, int lane, const Body& body) {
    const TokenCall& call = plan.call;
    const int begin = chunk * plan.chunk;  // nothing overflows: see most_tokens
    const int end = ::min(begin + plan.chunk, static_cast<int>(call.tokens));
    const int sequences = static_cast<int>(call.sequences), count = plan.pieces ? sequences : 1;
    int at = begin, i = plan.pieces ? sequence_of(call, begin, lane) : 0;
    while (at < end) {
        const bool dead = i >= count;
        int to = end;
        if (!dead && call.offsets) to = ::max(at, ::min(end, offset(call, plan.pieces ? i + 1 : sequences)));
        if (to > at) body(Piece{i, at, to, dead});
        at = to;
        ++i;
    }
}

// The pieces of a sequence, by number.
struct Range {
    int first, last;

    __device__ Range(const Plan& plan, int i)
        : first(offset(plan.call, i) / plan.chunk + i), last((offset(plan.call, i + 1) - 1) / plan.chunk + i) {}
};

// ------------------------------------------------------------------------------------------------------------- strips

// What a thread holds in shared memory for its tokens: numbers by slot, and behind those by gradient.
struct Held {
    float* at;

    __device__ __forceinline__ Four operator()(int number) const {
        const float4 x = *reinterpret_cast<const float4*>(at + number * strip);
        Four out;
        std::memcpy(&out, &x, sizeof x);
        return out;
    }
    __device__ __forceinline__ void put(int number, const Four& x) const {
        *reinterpret_cast<float4*>(at + number * strip) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    }
};

// Inputs by slot. Those of masked tokens are anything: what comes of them goes through `only`.
struct Inputs {
    Held held;
    Flags live;

    __device__ __forceinline__ Four operator()(int slot) const { return held(slot); }
    __device__ __forceinline__ Four only(const Four& x) const { return select(live, x, Four(0.0f)); }
};

// Sends for the inputs of this thread's tokens.
__device__ __forceinline__ void stage(const Plan& plan, unsigned slots, int token, int sequence, float* held) {
    const TokenCall& call = plan.call;
    const int left = static_cast<int>(call.tokens) - token;
    const unsigned vectors = left >= four ? plan.vectors & slots : 0;
#pragma unroll 4
    for (int slot = 0; slot < call.recipe.slots; ++slot)
        if (vectors >> slot & 1)
            __pipeline_memcpy_async(held + slot * strip, call.inputs[slot] + token, four * sizeof(float));
    for (unsigned rest = slots & ~vectors; rest; rest &= rest - 1) {
        const int slot = __ffs(rest) - 1;
        const bool one = call.per_sequence >> slot & 1;
        const float* const from = call.inputs[slot] + (one ? sequence : token);
        for (int k = 0; k < four; ++k)
            if (k < left) __pipeline_memcpy_async(held + slot * strip + k, from + (one ? 0 : k), sizeof(float));
    }
    __pipeline_commit();
}

__device__ __forceinline__ Flags inside(const Piece& piece, int token) {
    return each_of_four<Flags>([&](int k) { return token + k >= piece.begin && token + k < piece.end; });
}

// Calls body(token, there, x) for this thread's tokens of a piece, four at a time: of which some may not be there.
template <class Body>
__device__ __forceinline__ void each_token(const Plan& plan, unsigned slots, const Piece& piece, const Warp& warp,
                                           const Body& body) {
    float* const held = warp.held + four * warp.lane;  // no other thread looks at it
    for (int token = (piece.begin & ~(four - 1)) + four * warp.lane; token < piece.end; token += strip) {
        if (!piece.dead) stage(plan, slots, token, piece.sequence, held);
        slots &= ~plan.call.per_sequence;  // one number serves the whole piece
        const Flags there = inside(piece, token);
        Inputs x = {{held}, there};
        if (piece.dead) {
            x.live = Flags{};
        } else if (plan.call.mask) {
            x.live = load<Flags>(plan.call.mask + token, there);
        }
        __pipeline_wait_prior(0);
        body(token, there, x);
    }
}

// --------------------------------------------------------------------------------------------------- sums of sequences

__device__ __forceinline__ Four summand(const TokenRecipe& recipe, const Four& lp, const Four& old, const Inputs& x) {
    if (recipe.level != Level::geometric)
        return ratio_summand<Level::sequence_sum>(recipe, Four(0.0f), lp, old, x).value;
    return ratio_summand<Level::geometric>(recipe, advantage<Four>(recipe, x), lp, old, x).value;
}

__global__ void __launch_bounds__(token_threads, token_blocks) sums_kernel(const __grid_constant__ Plan plan) {
    LL_DYN_SMEM(unsigned char, memory);
    const TokenCall& call = plan.call;
    const TokenRecipe& recipe = call.recipe;
    const Warp warp = this_warp(recipe, memory);
    const int chunk = blockIdx.x * token_warps + warp.index;

    each_piece(plan, chunk, warp.lane, [&](const Piece& piece) {
        if (piece.dead) return;
        int n = 0;
        double of_ratio = 0, of_weight = 0;
        for (int k = 0; k < recipe.factor_count; ++k)
            warp.numbers[k * token_threads] = recipe.factors[k].over == Over::max ? -infinity : 0.0f;
        each_token(plan, plan.summed_slots, piece, warp, [&](int, const Flags&, const Inputs& x) {
            n += count(x.live);
            if (!plan.summed_slots) return;
            const Four lp = x(0), old = x(recipe.old);
            if (logitless::sums(recipe.level)) of_ratio += sum(x.only(summand(recipe, lp, old, x)));
            if (plan.vespo) of_weight += sum(x.only(Vespo::summand(recipe, lp, old, x)));
            for (int k = 0; k < recipe.factor_count; ++k) {
                const TokenFactor& of = recipe.factors[k];
                if (!of.of_sequence()) continue;
                double& so_far = warp.numbers[k * token_threads];
                const Four v = factor_summand<Four>(of, x);
                if (of.over == Over::max) {
                    so_far = Max::of(so_far, static_cast<double>(largest(select(x.live, v, Four(-infinity)))));
                } else {
                    so_far += sum(x.only(v));
                }
            }
        });
        double* const to = plan.sums + static_cast<std::int64_t>(chunk + piece.sequence) * plan.sum_count();
        const auto put = [&](int which, double value) {
            if (warp.lane == 0) to[which] = value;
        };
        put(SequenceSum::tokens, of_warp<Add>(n));
        if (logitless::sums(recipe.level)) put(SequenceSum::ratio, of_warp<Add>(of_ratio));
        if (plan.vespo) put(SequenceSum::log_weight, of_warp<Add>(of_weight));
        for (int k = 0; k < recipe.factor_count; ++k) {
            const double value = warp.numbers[k * token_threads];
            put(SequenceSum::factors + k,
                recipe.factors[k].over == Over::max ? of_warp<Max>(value) : of_warp<Add>(value));
        }
    });
}

// What a token's value takes of its sequence; math/policy.h reads them as float.
struct Sequence {
    float weight = 1;   // of its tokens: 1 / n with sequence_mean
    float inverse = 1;  // the derivative of its ratio's mean or sum by one of its tokens
    float ratio = 0, log_weight = 0;
    bool counts = false;  // it has a token under the mask, and begins in this piece
};

// From the pieces of `sums`; of factors into warp.numbers.
__device__ __forceinline__ Sequence gather(const Plan& plan, const Piece& piece, const Warp& warp) {
    Sequence found;
    if (!plan.pieces || piece.dead) return found;
    const TokenRecipe& recipe = plan.call.recipe;
    const int begin = offset(plan.call, piece.sequence);
    double n = offset(plan.call, piece.sequence + 1) - begin, of_ratio = 0, of_weight = 0;
    if (plan.summed) {
        const Range range(plan, piece.sequence);
        const int count = plan.sum_count();
        n = 0;
        for (int p = range.first + warp.lane; p <= range.last; p += warp_size) {
            const double* const at = plan.sums + static_cast<std::int64_t>(p) * count;
            n += at[SequenceSum::tokens];
            if (logitless::sums(recipe.level)) of_ratio += at[SequenceSum::ratio];
            if (plan.vespo) of_weight += at[SequenceSum::log_weight];
        }
        n = of_warp<Add>(n);
        of_ratio = of_warp<Add>(of_ratio);
        of_weight = of_warp<Add>(of_weight);
    }
    const double share = n > 0 ? 1 / n : 1;
    if (recipe.sequence_mean) found.weight = static_cast<float>(share);
    if (averages(recipe.level)) found.inverse = static_cast<float>(share);
    found.ratio = static_cast<float>(averages(recipe.level) ? of_ratio * share : of_ratio);
    found.log_weight = Vespo::log_weight(static_cast<float>(of_weight));
    found.counts = n > 0 && begin == piece.begin;

    for (int k = 0; k < recipe.factor_count; ++k) {
        const Over over = recipe.factors[k].over;
        if (over == Over::token) continue;
        const Range range(plan, piece.sequence);
        double v = over == Over::max ? -infinity : 0.0f;
        for (int p = range.first + warp.lane; p <= range.last; p += warp_size) {
            const double* const at = plan.sums + static_cast<std::int64_t>(p) * plan.sum_count();
            const double of_piece = at[SequenceSum::factors + k];
            v = over == Over::max ? Max::of(v, of_piece) : v + of_piece;
        }
        v = over == Over::max ? of_warp<Max>(v) : of_warp<Add>(v);
        warp.numbers[(recipe.penalty_count + k) * token_threads] = over == Over::mean ? v * share : v;
    }
    return found;
}

// ------------------------------------------------------------------------------------------------------------- values

// Of one thread's tokens.
struct Totals {
    int tokens = 0, low = 0, high = 0, kept = 0, sequences = 0;
    float k1 = 0, k3 = 0, ratio = 0, least = infinity, largest = 0, entropy = 0, factor = 0;
    double policy = 0;
};

template <class Op, class T>
__device__ __forceinline__ void put(Shared& shared, const Warp& warp, int which, T value) {
    value = of_warp<Op>(value);
    if (warp.lane == 0) shared.warps[which][warp.index] = value;
}

__device__ __forceinline__ double combine(int which, double a, double b) {
    return which == Total::least ? Min::of(a, b) : which == Total::largest ? Max::of(a, b) : a + b;
}

// From shared.total to call.results.
__device__ void finish(const TokenCall& call, const double* total) {
    const TokenRecipe& recipe = call.recipe;
    const double n = fmax(total[Total::tokens], 1.0);
    const double denominator = recipe.denominator == Denominator::tokens      ? n
                               : recipe.denominator == Denominator::sequences ? fmax(total[Total::sequences], 1.0)
                               : recipe.denominator == Denominator::given     ? *call.denominator
                                                                              : 1.0;
    const double norm = recipe.scale / denominator;
    double loss = total[Total::policy];
    double* to = call.results + 1;
    *to++ = norm * total[Total::policy];
    for (int k = 0; k < recipe.penalty_count; ++k) {
        loss += recipe.penalties[k].coef * total[Total::penalties + k];
        *to++ = norm * total[Total::penalties + k];
    }
    call.results[0] = norm * loss;
    const double ratio = total[Total::ratio];
    const bool any = total[Total::tokens] > 0 && ratio == ratio;
    *to++ = total[Total::tokens];
    *to++ = total[Total::low] / n;
    *to++ = total[Total::high] / n;
    *to++ = total[Total::k1] / n;
    *to++ = total[Total::k3] / n;
    *to++ = ratio / n;
    *to++ = any ? total[Total::least] : ratio;  // 0, or NaN
    *to++ = any ? total[Total::largest] : ratio;
    *to++ = total[Total::entropy] / n;
    *to++ = total[Total::factor] / n;
    *to++ = total[Total::kept] / n;
    *to++ = norm;
}

// All threads' totals to call.results, by the block that comes last.
__device__ __forceinline__ void add_up(const Plan& plan, Shared& shared, const Warp& warp, const Totals& t) {
    const int penalty_count = plan.call.recipe.penalty_count, count = Total::penalties + penalty_count;
    put<Add>(shared, warp, Total::tokens, t.tokens);
    put<Add>(shared, warp, Total::low, t.low);
    put<Add>(shared, warp, Total::high, t.high);
    put<Add>(shared, warp, Total::k1, t.k1);
    put<Add>(shared, warp, Total::k3, t.k3);
    put<Add>(shared, warp, Total::ratio, t.ratio);
    put<Min>(shared, warp, Total::least, t.least);
    put<Max>(shared, warp, Total::largest, t.largest);
    put<Add>(shared, warp, Total::entropy, t.entropy);
    put<Add>(shared, warp, Total::factor, t.factor);
    put<Add>(shared, warp, Total::kept, t.kept);
    put<Add>(shared, warp, Total::sequences, t.sequences);
    put<Add>(shared, warp, Total::policy, t.policy);
    for (int k = 0; k < penalty_count; ++k)
        put<Add>(shared, warp, Total::penalties + k, warp.numbers[k * token_threads]);
    block_barrier<14>();

    static_assert(Total::most <= warp_size, "the first warp has a thread for each");
    if (warp.index == 0) {
        const int i = warp.lane;
        if (i < count) {
            double value = shared.warps[i][0];
            for (int w = 1; w < token_warps; ++w) value = combine(i, value, shared.warps[i][w]);
            plan.totals[i * plan.blocks + blockIdx.x] = value;
            __threadfence();  // all see it before they see the ticket
        }
        __syncwarp();
        if (i == 0) shared.last = atomicInc(plan.call.ticket, gridDim.x - 1) == gridDim.x - 1;
    }
    block_barrier<15>();
    if (!shared.last) return;

    __threadfence();  // what others wrote before they took theirs is read behind this
    for (int i = warp.index; i < count; i += token_warps) {
        const double* const from = plan.totals + i * plan.blocks;
        double value = i == Total::least ? infinity : i == Total::largest ? -infinity : 0.0f;
        for (int b = warp.lane; b < plan.blocks; b += warp_size) value = combine(i, value, __ldcg(from + b));
        value = i == Total::least     ? of_warp<Min>(value)
                : i == Total::largest ? of_warp<Max>(value)
                                      : of_warp<Add>(value);
        if (warp.lane == 0) shared.total[i] = value;
    }
    block_barrier<16>();
    if (threadIdx.x == 0) finish(plan.call, shared.total);
}

__global__ void __launch_bounds__(token_threads, token_blocks) values_kernel(const __grid_constant__ Plan plan) {
    LL_DYN_SMEM(unsigned char, memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const TokenCall& call = plan.call;
    const TokenRecipe& recipe = call.recipe;
    const Warp warp = this_warp(recipe, memory);
    const int chunk = blockIdx.x * token_warps + warp.index;
    const Held slopes = {warp.held + strip * recipe.slots + four * warp.lane};  // by other inputs than lp
    const bool spread = spreads(recipe.level);

    const auto of_sequence = [&](int k) {
        return static_cast<float>(warp.numbers[(recipe.penalty_count + k) * token_threads]);
    };
    Totals totals;
    for (int k = 0; k < recipe.penalty_count; ++k) warp.numbers[k * token_threads] = 0;

    each_piece(plan, chunk, warp.lane, [&](const Piece& piece) {
        const Sequence of = gather(plan, piece, warp);
        if (warp.lane == 0) totals.sequences += of.counts;
        double back = 0;  // to every token that the sequence's ratio depends on

        each_token(plan, plan.slots, piece, warp, [&](int token, const Flags& there, const Inputs& x) {
            const Four zero(0.0f), one(1.0f);
            const Four lp = x(0), old = x(recipe.old), d = lp - old, a = advantage<Four>(recipe, x);
            const bool geometric = recipe.level == Level::geometric;
            Flags through = x.live;
            SurrogateValue<Four> s;
            {
                const Four r = logitless::sums(recipe.level) ? Four(of.ratio) : anchored(recipe, lp, old, x);
                const Dual<Four> l =
                    geometric ? log_ratio<Level::geometric>(recipe, r) : log_ratio<Level::token>(recipe, r);
                const SurrogateInputs<Four> inputs = {a, lp, old, capped_exp(l), Four(of.log_weight)};
                const Four& rho = inputs.rho.value;
                const Four counted = x.only(rho);
                totals.ratio += sum(counted);
                totals.least = fminf(totals.least, least(select(x.live, rho, Four(infinity))));
                totals.largest = fmaxf(totals.largest, largest(counted));
                Surrogates::visit(recipe.surrogate, recipe, [&](auto chosen) { s = chosen.at(inputs); });
            }
            if (geometric) {
                const Cut<Four> was = cut(recipe, a, d);
                s.low = s.low | was.low;
                s.high = s.high | was.high;
                through = through & !(was.c.slope == zero);
            }
            totals.tokens += count(x.live);
            totals.low += count(x.live & s.low);
            totals.high += count(x.live & s.high);
            const Four change = x.only(d);
            totals.k1 -= sum(change);
            totals.k3 += sum(capped_expm1(change).value - change);
            if (recipe.entropy >= 0) totals.entropy += sum(x.only(x(recipe.entropy)));

            if (recipe.factor_count) {
                Four product = one;
                for (int k = 0; k < recipe.factor_count; ++k) {
                    const TokenFactor& f = recipe.factors[k];
                    const Four v = f.of_sequence() ? Four(of_sequence(k)) : factor_summand<Four>(f, x);
                    product = product * factor(f, v, a, x);
                }
                totals.factor += sum(x.only(product));
                totals.kept += count(x.live & !(product == zero));
                s.value = times(product, s.value);
                s.by_ratio = times(product, s.by_ratio);
                s.by_lp = times(product, s.by_lp);
            }
            Four w(of.weight);
            if (recipe.weights >= 0) w = w * x(recipe.weights);
            w = x.only(w);
            totals.policy += sum(times(w, s.value));

            for (int g = 0; g < recipe.gradient_count; ++g) slopes.put(g, zero);
            Four by_lp = s.by_lp;
            if (spread) {
                back += sum(times(w, s.by_ratio));
            } else {
                by_lp = by_lp + s.by_ratio;
            }
            for (int k = 0; k < recipe.penalty_count; ++k) {
                const TokenPenalty& of = recipe.penalties[k];
                const PenaltyValue<Four> p = penalty(of, lp, old, x);
                warp.numbers[k * token_threads] += sum(times(w, p.value));
                by_lp = by_lp + Four(of.coef) * p.by_lp;
                for (int g = 0; g < recipe.gradient_count; ++g)
                    if (recipe.gradients[g] && recipe.gradients[g] == of.other)
                        slopes.put(g, slopes(g) + Four(of.coef) * p.by_other);
            }
            if (!call.slopes) return;
            for (int g = 0; g < recipe.gradient_count; ++g)
                store(call.slopes + g * call.tokens + token, there, times(w, recipe.gradients[g] ? slopes(g) : by_lp));
            if (spread) store(call.through + token, there, through);
        });
        if (spread && call.slopes && !piece.dead) {
            back = of_warp<Add>(back * of.inverse);
            if (warp.lane == 0) plan.slopes[chunk + piece.sequence] = back;
        }
    });
    add_up(plan, shared, warp, totals);
}

// ----------------------------------------------------------------------------------------------------------- backward

__global__ void __launch_bounds__(token_threads, token_blocks) backward_kernel(const __grid_constant__ Plan plan) {
    const TokenCall& call = plan.call;
    const TokenRecipe& recipe = call.recipe;
    const int lane = threadIdx.x % warp_size, chunk = blockIdx.x * token_warps + threadIdx.x / warp_size;
    const double norm = call.results[Total::penalties + recipe.penalty_count];
    const float factor = static_cast<float>(*call.upstream * norm);

    each_piece(plan, chunk, lane, [&](const Piece& piece) {
        float back = 0;
        if (plan.pieces && !piece.dead) {
            const Range range(plan, piece.sequence);
            double sum = 0;
            for (int p = range.first + lane; p <= range.last; p += warp_size) sum += plan.slopes[p];
            back = static_cast<float>(of_warp<Add>(sum));
        }
        for (int g = 0; g < recipe.gradient_count; ++g) {
            const float* const from = call.slopes + g * call.tokens;
            float* const to = call.out + g * call.tokens;
            const bool spread = plan.pieces && recipe.gradients[g] == 0;
#pragma unroll 4
            for (int token = (piece.begin & ~(four - 1)) + four * lane; token < piece.end; token += strip) {
                const Flags there = inside(piece, token);
                Four slope = load<Four>(from + token, there);
                if (spread) slope = slope + select(load<Flags>(call.through + token, there), Four(back), Four(0.0f));
                store(to + token, there, times(slope, Four(factor)));
            }
        }
    });
}

// ------------------------------------------------------------------------------------------------------------ the host

constexpr std::int64_t most_tokens = std::int64_t(1) << 30;

unsigned bit(int slot) { return slot < 0 ? 0u : 1u << slot; }

// What `sums` reads beside the mask.
unsigned summed_slots(const TokenRecipe& recipe, bool vespo) {
    unsigned slots = 0;
    if (logitless::sums(recipe.level)) slots |= bit(0) | bit(recipe.old) | bit(recipe.teacher);
    if (recipe.level == Level::geometric) {
        slots |= bit(recipe.advantages);
        for (int k = 0; k < recipe.reward_count; ++k)
            slots |= bit(recipe.rewards[k].plus) | bit(recipe.rewards[k].minus);
    }
    if (vespo) slots |= bit(0) | bit(recipe.old) | bit(recipe.rollout);
    for (int k = 0; k < recipe.factor_count; ++k)
        if (recipe.factors[k].of_sequence()) slots |= bit(recipe.factors[k].first) | bit(recipe.factors[k].rollout);
    return slots ? slots | bit(0) | bit(recipe.old) : 0;
}

Plan plan_of(const TokenCall& call, int device) {
    const TokenRecipe& recipe = call.recipe;
    Plan plan = {};
    plan.call = call;
    const std::int64_t warps = token_blocks * token_warps * Device(device).processors;  // of one wave
    const std::int64_t each = (call.tokens + warps - 1) / warps, tokens = (each + strip - 1) / strip * strip;
    plan.chunk = static_cast<int>(tokens ? tokens : strip);
    plan.chunks = static_cast<int>((call.tokens + plan.chunk - 1) / plan.chunk);
    plan.blocks = plan.chunks ? (plan.chunks + token_warps - 1) / token_warps : 1;

    plan.vespo = recipe.surrogate == Surrogates::find(Vespo::name);
    plan.slots = (1u << recipe.slots) - 1;
    plan.summed_slots = summed_slots(recipe, plan.vespo);
    for (int slot = 0; slot < recipe.slots; ++slot)
        plan.vectors |= (reinterpret_cast<std::uintptr_t>(call.inputs[slot]) % 16 == 0 ? 1u : 0u) << slot;
    plan.vectors &= ~call.per_sequence;
    const bool counts = recipe.sequence_mean || recipe.denominator == Denominator::sequences;
    plan.summed = plan.summed_slots || (counts && call.mask);
    plan.pieces = call.offsets && (plan.summed_slots || counts || call.per_sequence);

    plan.totals = call.workspace;
    plan.sums = plan.totals + Total::most * plan.blocks;
    plan.slopes = plan.sums + (plan.chunks + call.sequences) * plan.sum_count();
    return plan;
}

std::size_t workspace_of(const Plan& plan) {
    return Total::most * plan.blocks + (plan.chunks + plan.call.sequences) * (plan.sum_count() + 1);
}

bool sizes_fit(const TokenCall& call) { return call.tokens <= most_tokens && call.sequences <= most_tokens; }

std::size_t shared_bytes(const TokenRecipe& recipe) {
    return shared_head + sizeof(double) * token_threads * numbers_of_thread(recipe) +
           sizeof(float) * token_warps * held_by_warp(recipe);
}

cudaError_t launch(void (*kernel)(Plan), const Plan& plan, std::size_t shared, void* stream) {
    constexpr std::size_t granted = 48 << 10;  // without asking
    if (shared > granted) {
        const auto* const address = reinterpret_cast<const void*>(kernel);
        const int bytes = static_cast<int>(shared);
        const cudaError_t error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error) return error;
    }
    const Launch launch(plan.blocks, token_threads, shared, stream);
    return LL_LAUNCH(&launch.config, kernel, plan);
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" std::size_t logitless_cuda_token_workspace(const TokenCall* call, int device) {
    return sizes_fit(*call) ? workspace_of(plan_of(*call, device)) : 0;
}

extern "C" int logitless_cuda_tokens(const TokenCall* call, int device, void* stream) {
    if (!sizes_fit(*call)) return cudaErrorInvalidValue;
    const OnDevice current(device);
    if (current.error()) return current.error();
    const Plan plan = plan_of(*call, device);
    const std::size_t shared = shared_bytes(call->recipe);
    if (plan.summed) {
        const cudaError_t error = launch(sums_kernel, plan, shared, stream);
        if (error) return error;
    }
    return launch(values_kernel, plan, shared, stream);
}

extern "C" int logitless_cuda_tokens_backward(const TokenCall* call, int device, void* stream) {
    if (!sizes_fit(*call)) return cudaErrorInvalidValue;
    if (call->tokens == 0) return cudaSuccess;
    const OnDevice current(device);
    if (current.error()) return current.error();
    Plan plan = plan_of(*call, device);
    plan.pieces = logitless::spreads(call->recipe.level);
    return launch(backward_kernel, plan, 0, stream);
}
