// Entropic optimal transport, compiled once per instruction set with LL_COPY as the copy's name (setup.py).
//
//   half-iteration   s_i = -epsilon log sum_j exp((c_j - C_ij) / epsilon)   two readings of the cost, one from memory
//   plan             E_ij = exp((r_i + c_j - C_ij) / epsilon), sums of it times vectors, gradients: one reading
//   whole run        E once, and then per iteration its products with two vectors
//
// An exponential is some 17 operations on whole vectors. The whole run does one per entry, and then two multiply-adds
// per entry and iteration: stabilised scaling (Schmitzer 2019, section 3), with E = exp((f + g - C) / epsilon) at the
// potentials of an earlier iteration and the factors u, v by which those have moved since. E is absorbed anew where a
// factor leaves [2^-14, 2^14]. An entry of E that has underflowed, below 2^-126, is then at most 2^-98 of its row and
// 2^-28 of its column, whose sum must be above 2^-84.
//
// An iteration reads E once: a vector of rows gives its sums, those the rows' factors, and those rows, now in cache,
// are added up with them. Each entry is 4 bytes and two multiply-adds: bound by loads in cache, by memory beyond.
// The gradient of a run is E times a sum over iterations of two outer products: two products with vectors and two
// multiply-adds per entry and iteration, all from stored sums.

#include "sinkhorn.h"

#include "sweep.h"

namespace logitless {
namespace sinkhorn {
namespace {

constexpr float low = 0x1p-14f, high = 0x1p14f, least = 0x1p-84f;  // of v; of T, whose terms underflow at 2^-126

LL_FUNCTION Vector at(const float* from) { return Vector::load(from); }

template <int... lane>
struct Lanes {};
#if LL_VECTOR_BYTES == 64
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif LL_VECTOR_BYTES == 32
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// All lanes joined: each with the one h further on, in turn.
template <int h, int... lane>
LL_FUNCTION Vector swapped(Vector x, Lanes<lane...>) {
    return {__builtin_shufflevector(x.v, x.v, (lane ^ h)...)};
}
template <int h = width / 2, class Join>
LL_FUNCTION float joined(Vector x, const Join& join) {
    if constexpr (h == 0) {
        return x.v[0];
    } else {
        return joined<h / 2>(join(x, swapped<h>(x, AllLanes{})), join);
    }
}
LL_FUNCTION float sum(Vector x) {
    return joined(x, [](Vector a, Vector b) { return a + b; });
}
LL_FUNCTION float top_of(Vector x) {
    return joined(x, [](Vector a, Vector b) { return max(a, b); });
}

LL_FUNCTION bool all(Mask mask) {
    std::int32_t found = -1;
    for (int i = 0; i < width; ++i) found &= mask.v[i];
    return found != 0;
}

using logitless::finite;
LL_FUNCTION Vector finite(Vector top) { return select(top == Vector(-infinity), Vector(0.0f), top); }

// With -inf in the lanes that are not of the row.
LL_FUNCTION Vector bounded(Whole, Vector x) { return x; }
LL_FUNCTION Vector bounded(Part part, Vector x) {
    float values[width];
    x.store(values);
    for (int i = part.count; i < width; ++i) values[i] = -infinity;
    return at(values);
}

// term(j) of every vector of columns up to m, added up in two steps: fewer roundings.
template <class Term>
LL_FUNCTION Vector added(std::int64_t m, const Term& term) {
    constexpr std::int64_t block = 512;
    Vector total(0.0f);
    for (std::int64_t start = 0; start < m; start += block) {
        Vector part(0.0f);
        for (std::int64_t j = start; j < m && j < start + block; j += width) part = part + term(j);
        total = total + part;
    }
    return total;
}

// ------------------------------------------------------------------------------------------------- half-iterations

void softmin_rows(const Softmin& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    const Vector inverse(call.inverse);
    const std::int64_t columns = call.cost.columns;
    for (std::int64_t i = begin; i < end; ++i) {
        const float* cost = call.cost.at + i * call.cost.stride;
        Vector tops(-infinity);
        const auto entry = [&](std::int64_t j, auto access) {
            return bounded(access, access.load(call.c + j) - access.load(cost + j));
        };
        sweep(0, columns, [&](std::int64_t j, auto access) {
            prefetch(cost + j);
            tops = max(entry(j, access), tops);
        });
        const float top = finite(top_of(tops));
        const Vector origin(top);
        const std::int64_t whole = columns / width * width;
        Vector totals = added(whole, [&](std::int64_t j) { return exp((entry(j, Whole{}) - origin) * inverse); });
        sweep(whole, columns, [&](std::int64_t j, auto access) {
            totals = totals + exp((entry(j, access) - origin) * inverse);
        });
        call.top[i] = top;
        call.total[i] = sum(totals);
    }
}

// Some rows at a time: their maxima, then their exponentials, while they are in cache.
template <int vectors, class Access>
LL_FUNCTION void softmin_column_group(const Softmin& call, std::int64_t j, Access access) {
    constexpr std::int64_t together = 64;
    const Vector inverse(call.inverse);
    Vector top[vectors], total[vectors];
    for (int k = 0; k < vectors; ++k) top[k] = Vector(-infinity), total[k] = Vector(0.0f);
    for (std::int64_t begin = 0; begin < call.cost.rows; begin += together) {
        const std::int64_t end = begin + together < call.cost.rows ? begin + together : call.cost.rows;
        Vector raised[vectors];
        for (int k = 0; k < vectors; ++k) raised[k] = top[k];
        const auto entry = [&](std::int64_t i, int k) {
            return Vector(call.c[i]) - access.load(call.cost.at + i * call.cost.stride + j + k * width);
        };
        for (std::int64_t i = begin; i < end; ++i)
            for (int k = 0; k < vectors; ++k) raised[k] = max(entry(i, k), raised[k]);
        for (int k = 0; k < vectors; ++k) {
            total[k] = total[k] * exp((top[k] - finite(raised[k])) * inverse);
            top[k] = raised[k];
            raised[k] = finite(raised[k]);
        }
        for (std::int64_t i = begin; i < end; ++i)
            for (int k = 0; k < vectors; ++k) total[k] = total[k] + exp((entry(i, k) - raised[k]) * inverse);
    }
    for (int k = 0; k < vectors; ++k) {
        access.store(finite(top[k]), call.top + j + k * width);
        access.store(total[k], call.total + j + k * width);
    }
}

void softmin_columns(const Softmin& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    std::int64_t j = begin;
    for (; j + 4 * width <= end; j += 4 * width) softmin_column_group<4>(call, j, Whole{});
    sweep(j, end, [&](std::int64_t j, auto access) { softmin_column_group<1>(call, j, access); });
}

// ------------------------------------------------------------------------------------------------------------ plans

void plan(const Plan& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    constexpr std::int64_t block = 512;
    alignas(64) float entries[block], weighted[block];
    const std::int64_t columns = call.cost.columns, wide = padded(columns);
    const Vector inverse(call.inverse), E_slope(call.E_slope), EC_slope(call.EC_slope);
    for (std::int64_t part = begin; part < end; ++part) {
        float* column_sums = call.column_sums ? call.column_sums + part * call.count * wide : nullptr;
        if (column_sums) std::memset(column_sums, 0, call.count * wide * sizeof(float));
        const std::int64_t last = (part + 1) * piece < call.cost.rows ? (part + 1) * piece : call.cost.rows;
        for (std::int64_t i = part * piece; i < last; ++i) {
            const float* cost = call.cost.at + i * call.cost.stride;
            const Vector r(call.r[i]);
            for (int k = 0; call.row_sums && k < call.count; ++k) call.row_sums[i * call.count + k] = 0;
            for (std::int64_t start = 0; start < columns; start += block) {
                const std::int64_t stop = start + block < columns ? start + block : columns;
                sweep(start, stop, [&](std::int64_t j, auto access) {
                    prefetch(cost + j);
                    const Vector C = access.load(cost + j);
                    const Vector x = ((access.load(call.c + j) - C) + r) * inverse;
                    const Vector E = access.only(exp(min(Vector(0.0f), x)));
                    E.store(entries + (j - start));
                    times(E, call.origin ? C - access.load(call.origin + j) : C).store(weighted + (j - start));
                });
                const float* M = call.power ? weighted : entries;
                for (int k = 0; call.row_sums && k < call.count; ++k) {
                    Vector total(0.0f);
                    sweep(start, stop, [&](std::int64_t j, auto access) {
                        total = fma(at(M + (j - start)), access.load(call.across + k * columns + j), total);
                    });
                    call.row_sums[i * call.count + k] += sum(total);
                }
                for (int k = 0; column_sums && k < call.count; ++k) {
                    const Vector down(call.down[i * call.count + k]);
                    for (std::int64_t j = start; j < stop; j += width) {
                        float* to = column_sums + k * wide + j;
                        fma(at(M + (j - start)), down, at(to)).store(to);
                    }
                }
                if (call.gradient)
                    sweep(start, stop, [&](std::int64_t j, auto access) {
                        Vector factor(0.0f);
                        for (int k = 0; k < call.count; ++k)
                            factor = fma(Vector(call.left[i * call.count + k]),
                                         access.load(call.right + k * columns + j), factor);
                        const Vector E = at(entries + (j - start)), EC = at(weighted + (j - start));
                        const Vector slope = fma(EC_slope, EC, E_slope * E);
                        access.store(slope * factor, call.gradient + i * columns + j);
                    });
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ points

LL_FUNCTION Vector root(Vector x) {
    float values[width];
    x.store(values);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) values[i] = __builtin_sqrtf(values[i]);
    return at(values);
}

template <int tall, int vectors, class Access>
LL_FUNCTION void pairs_tile(const Pairs& call, std::int64_t i, std::int64_t j, Access access) {
    const std::int64_t m = call.columns;
    Vector total[tall][vectors];
    for (int r = 0; r < tall; ++r)
        for (int k = 0; k < vectors; ++k) total[r][k] = Vector(0.0f);
    for (std::int64_t d = 0; d < call.dimensions; ++d) {
        Vector y[vectors];
        for (int k = 0; k < vectors; ++k) y[k] = access.load(call.y + d * m + j + k * width);
#pragma GCC unroll 4
        for (int r = 0; r < tall; ++r) {
            const Vector x(call.x[(i + r) * call.dimensions + d]);
#pragma GCC unroll 2
            for (int k = 0; k < vectors; ++k) {
                const Vector difference = x - y[k];
                Vector& sum = total[r][k];
                sum = call.euclidean ? fma(difference, difference, sum) : sum + abs(difference);
            }
        }
    }
    for (int r = 0; r < tall; ++r)
        for (int k = 0; k < vectors; ++k)
            access.store(call.euclidean ? root(total[r][k]) : total[r][k], call.cost + (i + r) * m + j + k * width);
}

template <int tall>
LL_FUNCTION void pairs_rows(const Pairs& call, std::int64_t i) {
    std::int64_t j = 0;
    for (; j + 2 * width <= call.columns; j += 2 * width) pairs_tile<tall, 2>(call, i, j, Whole{});
    sweep(j, call.columns, [&](std::int64_t j, auto access) { pairs_tile<tall, 1>(call, i, j, access); });
}

void pairs(const Pairs& call, std::int64_t begin, std::int64_t end) {
    std::int64_t i = begin;
    for (; i + 4 <= end; i += 4) pairs_rows<4>(call, i);
    for (; i < end; ++i) pairs_rows<1>(call, i);
}

void signs(const Signs& call, std::int64_t begin, std::int64_t end) {
    const Vector zero(0.0f);
    for (std::int64_t i = begin; i < end; ++i)
        for (std::int64_t d = 0; d < call.dimensions; ++d) {
            const Vector x(call.x[i * call.dimensions + d]);
            Vector total = zero;
            sweep(0, call.columns, [&](std::int64_t j, auto access) {
                const Vector G = access.load(call.gradient + i * call.columns + j);
                const Vector y = access.load(call.y + d * call.columns + j);
                total = total + select(x > y, G, select(y > x, -G, zero));
            });
            call.out[i * call.dimensions + d] = sum(total);
        }
}

// ------------------------------------------------------------------------------------------------ products with E

// Of lanes in groups of h: a's pairs of neighbouring groups added up in the even groups, b's in the odd ones.
template <int h, int... lane>
LL_FUNCTION Vector fold(Vector a, Vector b, Lanes<lane...>) {
    const Floats first = __builtin_shufflevector(a.v, b.v, ((lane / h) % 2 == 0 ? lane : width + lane - h)...);
    const Floats second = __builtin_shufflevector(a.v, b.v, ((lane / h) % 2 == 0 ? lane + h : width + lane)...);
    return {first + second};
}

// The sums of a vector's number of vectors, as a vector.
template <int h = 1>
LL_FUNCTION Vector sums(Vector (&of)[width / h]) {
    if constexpr (h == width) {
        return of[0];
    } else {
        Vector folded[width / h / 2];
#pragma GCC unroll 16
        for (int i = 0; i < width / h / 2; ++i) folded[i] = fold<h>(of[2 * i], of[2 * i + 1], AllLanes{});
        return sums<2 * h>(folded);
    }
}

// sum_j E_ij v_j of a vector's number of rows.
LL_FUNCTION Vector dots(const float* E, const float* v, std::int64_t m) {
    constexpr std::int64_t block = 1024;  // added up in two steps: fewer roundings
    Vector total(0.0f);
    for (std::int64_t start = 0; start < m; start += block) {
        Vector of[width];
#pragma GCC unroll 16
        for (int k = 0; k < width; ++k) of[k] = Vector(0.0f);
        const std::int64_t stop = start + block < m ? start + block : m;
        for (std::int64_t j = start; j < stop; j += width) {
            const Vector factor = at(v + j);
#pragma GCC unroll 16
            for (int k = 0; k < width; ++k) of[k] = fma(at(E + k * m + j), factor, of[k]);
        }
        total = total + sums(of);
    }
    return total;
}

// to_j += sum_i u_i E_ij, over as many rows.
LL_FUNCTION void add_rows(const float* E, Vector u, std::int64_t m, float* to) {
    float factors[width];
    u.store(factors);
    Vector spread[width];
#pragma GCC unroll 16
    for (int k = 0; k < width; ++k) spread[k] = Vector(factors[k]);
    for (std::int64_t j = 0; j < m; j += width) {
        Vector even = at(to + j), odd(0.0f);
#pragma GCC unroll 16
        for (int k = 0; k < width; k += 2) {
            even = fma(at(E + k * m + j), spread[k], even);
            odd = fma(at(E + (k + 1) * m + j), spread[k + 1], odd);
        }
        (even + odd).store(to + j);
    }
}

LL_FUNCTION Vector pieces_joined(const Work& w, std::int64_t j) {
    Vector total(0.0f);
    for (std::int64_t part = 0; part < pieces(w.n); ++part) total = total + at(w.partial + part * w.m + j);
    return total;
}

template <class Rows>  // rows(i, vector of E's products with `v` if wanted) gives the factors of the rows from i on
LL_FUNCTION void pass(const Work& w, std::int64_t part, const float* v, const Rows& rows) {
    float* to = w.partial + part * w.m;
    std::memset(to, 0, w.m * sizeof(float));
    const std::int64_t last = (part + 1) * piece < w.n ? (part + 1) * piece : w.n;
    for (std::int64_t i = part * piece; i < last; i += width) {
        const float* E = w.E + i * w.m;
        add_rows(E, rows(i, v ? dots(E, v, w.m) : Vector(0.0f)), w.m, to);
    }
}

// -------------------------------------------------------------------------------------------------------- whole runs

LL_FUNCTION Vector power(const Side& side, Vector log_x) { return exp(Vector(side.damping) * log_x); }

// scale_i S_i^-l_a, 0 of rows that reach nothing.
LL_FUNCTION Vector row_factor(const Work& w, std::int64_t i, Vector S) {
    const Vector u = w.a.balanced ? at(w.scale + i) / S : at(w.scale + i) * power(w.a, -log(S));
    return select(S == Vector(0.0f), Vector(0.0f), u);
}

LL_FUNCTION Mask live(const float* weights, std::int64_t i) { return at(weights + i) > Vector(0.0f); }

void weighted(const float* from, const float* weights, float epsilon, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; i += width) {
        const Vector x = fma(Vector(epsilon), log(at(weights + i)), at(from + i));
        select(live(weights, i), x, Vector(-infinity)).store(to + i);
    }
}

void absorb(const Work& w, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    const Vector inverse(w.inverse);
    for (std::int64_t i = begin; i < end; ++i) {
        float* E = w.E + i * w.m;
        if (i >= w.cost.rows) {
            std::memset(E, 0, w.m * sizeof(float));
            w.s[i] = infinity;
            w.scale[i] = 0;
            continue;
        }
        const float* cost = w.cost.at + i * w.cost.stride;
        Vector tops(-infinity);
        for (std::int64_t j = w.m - lanes; j < w.m; j += width) Vector(-infinity).store(E + j);
        sweep(0, w.cost.columns, [&](std::int64_t j, auto access) {
            prefetch(cost + j);
            const Vector x = at(w.c + j) - access.load(cost + j);  // c is -inf beyond the columns
            x.store(E + j);
            tops = max(x, tops);
        });
        const Vector top(finite(top_of(tops)));
        const float total = sum(added(w.m, [&](std::int64_t j) {
            const Vector x = exp((at(E + j) - top) * inverse);
            x.store(E + j);
            return x;
        }));
        const float s = total == 0 ? infinity : -(top_of(top) + w.epsilon * log(total));
        const Vector normal(total == 0 ? 0.0f : 1.0f / total);
        for (std::int64_t j = 0; j < w.m; j += width) (at(E + j) * normal).store(E + j);
        w.s[i] = s;
        w.scale[i] = w.a.balanced ? w.weights_a[i] : w.weights_a[i] * exp(-s * w.a.rate);
    }
}

void iterate(const Work& w, std::int64_t part) {
    const FlushDenormals guard;
    pass(w, part, w.v, [&](std::int64_t i, Vector S) {
        S.store(w.S + i);
        return row_factor(w, i, S);
    });
}

// The v_j that goes with T_j.
LL_FUNCTION Vector column_factor(const Work& w, std::int64_t j, Vector T) {
    const Vector ratio = at(w.weights_b + j) / T;
    return w.b.balanced ? ratio : power(w.b, log(ratio)) * exp(at(w.g + j) * Vector(-w.b.rate));
}

bool columns(const Work& w, double* residual) {
    const FlushDenormals guard;
    Vector missed(0.0f);
    bool fine = true;
    for (std::int64_t j = 0; j < w.m; j += width) {
        const Vector b = at(w.weights_b + j), v = at(w.v + j), T = pieces_joined(w, j);
        const Mask here = live(w.weights_b, j) & live(w.reached, j);
        const Vector next = column_factor(w, j, T);
        Vector target = b;
        if (!w.b.balanced) {
            const Vector old = fma(Vector(w.epsilon), log(v), at(w.g + j));
            target = b * exp(old * Vector(-1.0f / w.b.rho));
        }
        const Mask in_range = (next > Vector(low)) & (Vector(high) > next) & (T > Vector(least));
        fine &= all({in_range.v | ~here.v});
        if (residual) missed = missed + abs(v * T - target);
        T.store(w.T + j);
        select(here, next, Vector(1.0f)).store(w.next + j);
    }
    if (residual) *residual = sum(missed);
    return fine;
}

void row_potentials(const Work& w, const float* S, float* f) {
    for (std::int64_t i = 0; i < w.n; i += width) {
        const Vector x = Vector(w.a.damping) * fma(Vector(-w.epsilon), log(at(S + i)), at(w.s + i));
        select(live(w.weights_a, i) & live(S, i), x, Vector(0.0f)).store(f + i);
    }
}

void column_potentials(const Work& w, const float* v, float* g) {
    for (std::int64_t j = 0; j < w.m; j += width) {
        const Vector x = fma(Vector(w.epsilon), log(at(v + j)), at(w.g + j));
        select(live(w.weights_b, j) & live(w.reached, j), x, Vector(0.0f)).store(g + j);
    }
}

void row_sums(const Work& w, std::int64_t begin, std::int64_t end, float* rows) {
    const FlushDenormals guard;
    for (std::int64_t i = begin; i < end; i += width)
        (row_factor(w, i, at(w.S + i)) * dots(w.E + i * w.m, w.v, w.m)).store(rows + i);
}

// ---------------------------------------------------------------------------------------------------------- backward

void factors(const Work& w) {
    for (std::int64_t j = 0; j < w.m; j += width) {
        const Vector T = at(w.T + j);
        select(live(w.weights_b, j) & (T > Vector(0.0f)), column_factor(w, j, T), Vector(1.0f)).store(w.v + j);
    }
}

void iterate_back(const Backward& call, std::int64_t part) {
    const FlushDenormals guard;
    const Work& w = call.work;
    pass(w, part, call.given ? nullptr : w.p, [&](std::int64_t i, Vector product) {
        const Vector S = at(w.S + i), u = row_factor(w, i, S);
        const Vector x = call.given ? at(w.x + i) : -(u * product);
        fma(Vector(w.epsilon), x, at(call.log_a + i)).store(call.log_a + i);
        const Vector of_f = call.of_f ? x + at(call.of_f + i) : x;
        const Vector q = select(live(w.weights_a, i) & live(w.S, i), Vector(w.a.damping) * of_f / S, Vector(0.0f));
        u.store(call.u + i);
        q.store(call.q + i);
        return q;
    });
}

void columns_back(const Backward& call, float* of_g) {
    const FlushDenormals guard;
    const Work& w = call.work;
    for (std::int64_t j = 0; j < w.m; j += width) {
        const Vector y = -(at(w.v + j) * pieces_joined(w, j));
        fma(Vector(w.epsilon), y, at(call.log_b + j)).store(call.log_b + j);
        y.store(of_g + j);
    }
}

template <int vectors, class Access>
LL_FUNCTION void add_back_tile(const Work& w, std::int64_t i, int rows, std::int64_t j, std::int64_t count,
                               const float* us, const float* vs, float* gradient, bool first, Access access) {
    constexpr int tall = 4;
    Vector total[tall][vectors];
    for (int r = 0; r < tall; ++r)
        for (int k = 0; k < vectors; ++k) total[r][k] = Vector(0.0f);
    for (std::int64_t l = 0; l < count; ++l)
#pragma GCC unroll 4
        for (int r = 0; r < tall; ++r)
#pragma GCC unroll 4
            for (int k = 0; k < vectors; ++k)
                total[r][k] = fma(Vector(us[l * w.n + i + r]), at(vs + l * w.m + j + k * width), total[r][k]);
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < vectors; ++k) {
            float* to = gradient + (i + r) * w.cost.columns + j + k * width;
            const Vector more = total[r][k] * at(w.E + (i + r) * w.m + j + k * width);
            access.store(first ? more : access.load(to) + more, to);
        }
}

void add_back(const Work& w, std::int64_t begin, std::int64_t end, std::int64_t count, const float* us,
              const float* vs, float* gradient, bool first) {
    const FlushDenormals guard;
    constexpr int vectors = LL_VECTOR_BYTES == 64 ? 4 : 2;
    for (std::int64_t i = begin; i < end; i += 4) {
        const int rows = static_cast<int>(end - i < 4 ? end - i : 4);
        std::int64_t j = 0;
        for (; j + vectors * width <= w.cost.columns; j += vectors * width)
            add_back_tile<vectors>(w, i, rows, j, count, us, vs, gradient, first, Whole{});
        sweep(j, w.cost.columns, [&](std::int64_t j, auto access) {
            add_back_tile<1>(w, i, rows, j, count, us, vs, gradient, first, access);
        });
    }
}

void log_back(const Work& w, std::int64_t begin, std::int64_t end, float* gradient) {
    const FlushDenormals guard;
    const Vector inverse(w.inverse);
    for (std::int64_t i = begin; i < end; ++i) {
        const float* cost = w.cost.at + i * w.cost.stride;
        const Vector r(w.r[i]);
        Vector total(0.0f);
        sweep(0, w.cost.columns, [&](std::int64_t j, auto access) {
            const Vector x = (r - access.load(cost + j)) - access.load(w.c + j);
            const Vector E = access.only(exp(x * inverse)) * access.load(w.next + j);
            total = total + E;
            if (gradient) {
                float* to = gradient + i * w.cost.columns + j;
                access.store(access.load(to) + E, to);
            }
        });
        w.x[i] = -sum(total);
    }
}

constexpr Kernels kernels = {
    softmin_rows, softmin_columns, plan, pairs, signs, weighted, absorb, iterate, columns,
    row_potentials, column_potentials, row_sums, factors, iterate_back, columns_back, add_back, log_back};

}  // namespace

const Kernels Kernels::LL_COPY = kernels;

}  // namespace sinkhorn
}  // namespace logitless
