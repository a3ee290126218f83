// Doubly stochastic matrices (math/doubly_stochastic.h), compiled once per instruction set with LL_COPY as the copy's
// name (setup.py).
//
//   forward    P and its residual from logits       4 bytes read and 4 written per entry
//   backward   dL/dlogits from logits and dL/dP     8 bytes read and 4 written; the run is repeated
//
// For n <= 16 a vector holds an entry of `width` matrices, larger ones are done alone, vectors along their rows. An
// iteration costs 2 n^2 operations (backward 8) and 2 n reciprocals; exponentials are taken once. The history of a
// run is 2 (iterations + 1) n numbers per matrix, in one buffer per thread.
//
// In float that holds while no entry of K that is not 0 is below e^-50 and no scaling beyond 2^+-50: nothing overflows
// or is lost then. Other matrices ("exact" and "megatron") are done again, one at a time, in the log domain and in
// double, where any logits are as good as others. Which of both does a matrix depends on that matrix alone.

#include <new>

#include "../math/doubly_stochastic.h"
#include "sweep.h"
#include "transport.h"

namespace logitless {
namespace transport {
namespace {

constexpr int largest_n = 64, in_lanes = 16;
constexpr float least_log = -50.0f, least_scaling = 0x1p-50f, largest_scaling = 0x1p50f;

template <class T>
struct Buffer {
    T* const data;

    explicit Buffer(std::int64_t size) : data(new T[size]) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { delete[] data; }
};

// ------------------------------------------------------------------------------------------------------- log domain

// One matrix. P_ij = exp(x_ij + f_i + g_j); a step over rows lowers f_i by max(log sum_j P_ij, log eps).
class LogDomain {
public:
    LogDomain(int n, int iterations, Dialect dialect)
        : n(n), iterations(iterations),
          log_eps(dialect == Dialect::megatron ? __builtin_log(dialect_eps) : -__builtin_inf()),
          history(2 * n * (iterations + 1)) {}

    void forward(const float* logits, float* out, float* residual) {
        run(logits);
        const double *f = at(iterations), *g = f + n;
        double worst = 0;
        for (int side = 0; side < 2; ++side)
            for (int i = 0; i < n; ++i) {
                double sum = 0;
                for (int j = 0; j < n; ++j) sum += side ? entry(j, i, f, g) : entry(i, j, f, g);
                const double off = __builtin_fabs(sum - 1);
                worst = worst > off ? worst : off;  // a NaN stays
            }
        *residual = static_cast<float>(worst);
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) out[i * n + j] = static_cast<float>(entry(i, j, f, g));
    }

    void backward(const float* logits, const float* upstream, float* out) {
        run(logits);
        double a[largest_n] = {}, b[largest_n] = {}, z[largest_n * largest_n];
        const double *f = at(iterations), *g = f + n;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) {
                z[i * n + j] = upstream[i * n + j] * entry(i, j, f, g);
                a[i] += z[i * n + j];
                b[j] += z[i * n + j];
            }
        for (int t = iterations; t > 0; --t) {
            const double *old = at(t - 1), *next = at(t);
            for (int j = 0; j < n; ++j) {
                if (raised(old[n + j], next[n + j])) continue;
                for (int i = 0; i < n; ++i) {
                    const double part = b[j] == 0 ? 0 : b[j] * entry(i, j, next, next + n);
                    z[i * n + j] -= part;
                    a[i] -= part;
                }
                b[j] = 0;
            }
            for (int i = 0; i < n; ++i) {
                if (raised(old[i], next[i])) continue;
                for (int j = 0; j < n; ++j) {
                    const double part = a[i] == 0 ? 0 : a[i] * entry(i, j, next, old + n);
                    z[i * n + j] -= part;
                    b[j] -= part;
                }
                a[i] = 0;
            }
        }
        for (int i = 0; i < n * n; ++i) out[i] = static_cast<float>(z[i]);
    }

private:
    const int n, iterations;
    const double log_eps;
    const Buffer<double> history;
    const float* x = nullptr;

    static double exponential(double x) { return x < -750 ? 0 : __builtin_exp(x); }  // mostly 0 where logits are huge
    double* at(int t) const { return history.data + 2 * n * t; }
    double entry(int i, int j, const double* f, const double* g) const {
        return exponential(x[i * n + j] + f[i] + g[j]);
    }
    // A sum that was raised to eps: the potential does not depend on it.
    bool raised(double old, double next) const { return next - old > -log_eps - 1e-9; }

    // log sum exp of n values, -inf if they are
    template <class Value>
    double log_sum(const Value& value) const {
        double top = -__builtin_inf(), sum = 0;
        for (int k = 0; k < n; ++k) top = value(k) > top ? value(k) : top;
        if (top == -__builtin_inf()) top = 0;
        for (int k = 0; k < n; ++k) sum += exponential(value(k) - top);
        return top + __builtin_log(sum);
    }
    double lowered(double potential, double log_sum) const {
        log_sum = log_sum < log_eps ? log_eps : log_sum;
        return log_sum == -__builtin_inf() ? potential : potential - log_sum;
    }

    void run(const float* logits) {
        x = logits;
        for (int i = 0; i < n; ++i) {
            float top = -infinity;
            for (int j = 0; j < n; ++j) top = max(x[i * n + j], top);
            at(0)[i] = -finite(top);
            at(0)[n + i] = 0;
        }
        for (int t = 0; t < iterations; ++t) {
            const double *f = at(t), *g = f + n;
            double *new_f = at(t + 1), *new_g = new_f + n;
            for (int i = 0; i < n; ++i)
                new_f[i] = lowered(f[i], f[i] + log_sum([&](int j) { return x[i * n + j] + g[j]; }));
            for (int j = 0; j < n; ++j)
                new_g[j] = lowered(g[j], g[j] + log_sum([&](int i) { return x[i * n + j] + new_f[i]; }));
        }
    }
};

// ------------------------------------------------------------------------------------------- K, and what comes of it

// Of the entries of K, those that are not 0: the logarithm of the least.
LL_FUNCTION Vector least_of(Vector x, Vector least) {
    return select(x == Vector(-infinity), least, min(least, x));
}

// A NaN, or numbers that were too large or too small on the way.
LL_FUNCTION Mask sound(Vector least_entry, const Extremes<Vector>& extremes, Vector total) {
    const Mask entries = least_entry > Vector(least_log), low = extremes.least > Vector(least_scaling),
               high = Vector(largest_scaling) > extremes.largest, number = total == total;
    return {entries.v & low.v & high.v & number.v};
}

// `width` matrices, one per lane.
template <Dialect dialect, int fixed>
struct InLanes {
    using Layout = Lanes<Vector, fixed, in_lanes>;
    static constexpr int most = Layout::most * Layout::most;
    const int n, size;
    Vector x[most], k[most];  // logits less the row's maximum, or their softmax; and K
    Vector least;

    // Matrix m of `count` in lane m, the last one in what lanes are left.
    LL_FUNCTION void load(const float* from, int count, Vector* to) const {
        alignas(64) float lanes[most * width];
        for (int m = 0; m < width; ++m) {
            const float* const matrix = from + (m < count ? m : count - 1) * size;
            for (int e = 0; e < size; ++e) lanes[e * width + m] = matrix[e];
        }
        for (int e = 0; e < size; ++e) to[e] = Vector::load(lanes + e * width);
    }
    LL_FUNCTION void store(const Vector* from, int count, float* to) const {
        alignas(64) float lanes[most * width];
        for (int e = 0; e < size; ++e) from[e].store(lanes + e * width);
        for (int m = 0; m < count; ++m)
            for (int e = 0; e < size; ++e) to[m * size + e] = lanes[e * width + m];
    }

    LL_FUNCTION InLanes(const float* logits, int count, int given)
        : n(fixed ? fixed : given), size(n * n), least(0.0f) {
        load(logits, count, x);
        for (int i = 0; i < n; ++i) {
            Vector* const row = x + i * n;
            Vector top = row[0], sum(0.0f);
            for (int j = 1; j < n; ++j) top = max(top, row[j]);
            top = select(top == Vector(-infinity), Vector(0.0f), top);
            for (int j = 0; j < n; ++j) {
                row[j] = row[j] - top;
                least = least_of(row[j], least);
                k[i * n + j] = exp(row[j]);
                sum = sum + k[i * n + j];
            }
            if (dialect == Dialect::deepseek) {
                const Vector factor = reciprocal(sum);
                for (int j = 0; j < n; ++j) {
                    x[i * n + j] = k[i * n + j] * factor;  // the softmax
                    k[i * n + j] = x[i * n + j] + Vector(dialect_eps);
                }
            }
        }
    }

    LL_FUNCTION Mask forward(int iterations, Vector* p, Vector& residual) const {
        const Layout matrix = {k, n};
        Vector scalings[2 * Layout::most];
        const Extremes<Vector> extremes = normalize<dialect, false>(matrix, iterations, scalings);
        Vector rows[Layout::most], columns[Layout::most], total(0.0f);
        for (int i = 0; i < n; ++i) rows[i] = columns[i] = Vector(0.0f);
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) {
                const Vector entry = k[i * n + j] * scalings[i] * scalings[n + j];
                p[i * n + j] = entry;
                rows[i] = rows[i] + entry;
                columns[j] = columns[j] + entry;
            }
        residual = Vector(0.0f);
        for (int i = 0; i < n; ++i) {
            residual = max(residual, abs(rows[i] - Vector(1.0f)));
            residual = max(residual, abs(columns[i] - Vector(1.0f)));
            total = total + rows[i];
        }
        return sound(least, extremes, total);
    }

    // dL/dP, in place, to dL/dlogits
    LL_FUNCTION Mask backward(int iterations, Vector* history, Vector* z) const {
        const Layout matrix = {k, n};
        const Extremes<Vector> extremes = normalize<dialect, true>(matrix, iterations, history);
        const Vector *u = history + 2 * n * iterations, *v = u + n;
        Vector sums[Layout::most], total(0.0f);
        for (int j = 0; j < n; ++j) sums[j] = Vector(0.0f);
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) {
                const Vector entry = k[i * n + j] * u[i] * v[j];
                total = total + entry;
                z[i * n + j] = z[i * n + j] * entry;
                sums[j] = sums[j] + z[i * n + j];
            }
        differentiate<dialect>(matrix, iterations, history, z, sums);
        if (dialect == Dialect::deepseek)
            for (int i = 0; i < n; ++i)
                through_softmax(n, [&](int j) { return x[i * n + j]; }, k + i * n, z + i * n,
                                [](Vector sum) { return sum; });
        return sound(least, extremes, total);
    }
};

template <Dialect dialect, int fixed>
void forward_lanes(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = call.n * call.n;
    for (std::int64_t first = begin; first < end; first += width) {
        const int count = static_cast<int>(end - first < width ? end - first : width);
        const InLanes<dialect, fixed> matrices(call.logits + first * size, count, call.n);
        Vector p[matrices.most], residual;
        const Mask sound = matrices.forward(call.iterations, p, residual);
        matrices.store(p, count, call.out + first * size);
        for (int m = 0; m < count; ++m) {
            const std::int64_t at = first + m;
            call.residual[at] = residual.v[m];
            if (!sound.v[m] && dialect != Dialect::deepseek)
                LogDomain(call.n, call.iterations, dialect)
                    .forward(call.logits + at * size, call.out + at * size, call.residual + at);
        }
    }
}

template <Dialect dialect, int fixed>
void backward_lanes(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = call.n * call.n;
    const Buffer<Vector> history(2 * call.n * (call.iterations + 1));
    for (std::int64_t first = begin; first < end; first += width) {
        const int count = static_cast<int>(end - first < width ? end - first : width);
        const InLanes<dialect, fixed> matrices(call.logits + first * size, count, call.n);
        Vector z[matrices.most];
        matrices.load(call.upstream + first * size, count, z);
        const Mask sound = matrices.backward(call.iterations, history.data, z);
        matrices.store(z, count, call.out + first * size);
        for (int m = 0; m < count; ++m) {
            const std::int64_t at = (first + m) * size;
            if (!sound.v[m] && dialect != Dialect::deepseek)
                LogDomain(call.n, call.iterations, dialect)
                    .backward(call.logits + at, call.upstream + at, call.out + at);
        }
    }
}

// ------------------------------------------------------------------------------------------------------ one by one

// One matrix, its rows padded with zeros to whole vectors; and its transpose.
struct Rows {
    using T = Vector;
    static constexpr int most = largest_n / width;
    int n, vectors;
    const Vector *k, *transposed;  // [n, vectors]

    LL_FUNCTION int count() const { return vectors; }

    static LL_FUNCTION float at(const Vector* x, int i) { return x[i / width].v[i % width]; }

    // to = sum_i x_i matrix_i
    LL_FUNCTION void combine(const Vector* matrix, const Vector* x, Vector* to) const {
        for (int c = 0; c < vectors; ++c) {
            Vector sums[4] = {Vector(0.0f), Vector(0.0f), Vector(0.0f), Vector(0.0f)};
            int i = 0;
            for (; i + 4 <= n; i += 4)
                for (int s = 0; s < 4; ++s)
                    sums[s] = fma(Vector(at(x, i + s)), matrix[(i + s) * vectors + c], sums[s]);
            for (; i < n; ++i) sums[0] = fma(Vector(at(x, i)), matrix[i * vectors + c], sums[0]);
            to[c] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
    }
    LL_FUNCTION Vector only(int c, Vector x, Vector other) const {
        float lanes[width];
        for (int i = 0; i < width; ++i) lanes[i] = static_cast<float>(i);
        return select(Vector(static_cast<float>(n - c * width)) > Vector::load(lanes), x, other);
    }
    LL_FUNCTION void rows(const Vector* x, Vector* to) const { combine(transposed, x, to); }
    LL_FUNCTION void columns(const Vector* x, Vector* to) const { combine(k, x, to); }
    LL_FUNCTION void rows_after(const Vector* x, const Vector* y, Vector* z, Vector* sums) const {
        for (int i = 0; i < n; ++i) {
            const Vector factor(-at(x, i));
            Vector sum(0.0f);
            for (int c = 0; c < vectors; ++c) {
                z[i * vectors + c] = fma(k[i * vectors + c] * factor, y[c], z[i * vectors + c]);
                sum = sum + z[i * vectors + c];
            }
            sums[i / width].v[i % width] = total(sum);
        }
    }
    LL_FUNCTION void columns_after(const Vector* x, const Vector* y, Vector* z, Vector* sums) const {
        for (int c = 0; c < vectors; ++c) sums[c] = Vector(0.0f);
        for (int i = 0; i < n; ++i) {
            const Vector factor(-at(x, i));
            for (int c = 0; c < vectors; ++c) {
                z[i * vectors + c] = fma(k[i * vectors + c] * factor, y[c], z[i * vectors + c]);
                sums[c] = sums[c] + z[i * vectors + c];
            }
        }
    }
};

// The scalings, what comes of them, and P, of a matrix that is too large for lanes.
template <Dialect dialect>
struct Single {
    static constexpr int most = Rows::most, size = largest_n * most;
    Rows matrix;
    const int n, count;
    Vector x[size], k[size], transposed[size];
    float least;

    LL_FUNCTION Single(const float* logits, int n) : n(n), count((n + width - 1) / width) {
        matrix = {n, count, k, transposed};
        for (int i = 0; i < n * count; ++i) transposed[i] = Vector(0.0f);
        Vector least_entries(0.0f);
        for (int i = 0; i < n; ++i) {
            Vector* const row = x + i * count;
            load_row(logits + i * n, -infinity, row);
            Vector tops = row[0], sums(0.0f);
            for (int c = 1; c < count; ++c) tops = max(tops, row[c]);
            const Vector top(finite(largest(tops)));
            for (int c = 0; c < count; ++c) {
                row[c] = row[c] - top;
                least_entries = least_of(row[c], least_entries);
                k[i * count + c] = exp(row[c]);
                sums = sums + k[i * count + c];
            }
            if (dialect == Dialect::deepseek) {
                const Vector factor(1.0f / total(sums));
                for (int c = 0; c < count; ++c) {
                    row[c] = k[i * count + c] * factor;
                    k[i * count + c] = matrix.only(c, row[c] + Vector(dialect_eps), Vector(0.0f));
                }
            }
            for (int j = 0; j < n; ++j) transposed[j * count + i / width].v[i % width] = Rows::at(k + i * count, j);
        }
        least = -largest(-least_entries);
    }

    LL_FUNCTION void load_row(const float* from, float fill, Vector* to) const {
        float lanes[largest_n];
        for (float& lane : lanes) lane = fill;
        std::memcpy(lanes, from, n * sizeof(float));
        for (int c = 0; c < count; ++c) to[c] = Vector::load(lanes + c * width);
    }
    LL_FUNCTION void store_row(const Vector* from, float* to) const {
        float lanes[largest_n];
        for (int c = 0; c < count; ++c) from[c].store(lanes + c * width);
        std::memcpy(to, lanes, n * sizeof(float));
    }
    LL_FUNCTION bool sound(const Extremes<Vector>& extremes, Vector total) const {
        const Mask mask = logitless::transport::sound(Vector(least), extremes, total);
        for (int i = 0; i < width; ++i)
            if (!mask.v[i]) return false;
        return true;
    }

    LL_FUNCTION bool forward(int iterations, float* out, float* residual) const {
        Vector scalings[2 * most], columns[most], p[most], all(0.0f);
        const Extremes<Vector> extremes = normalize<dialect, false>(matrix, iterations, scalings);
        for (int c = 0; c < count; ++c) columns[c] = Vector(0.0f);
        float worst = 0;
        for (int i = 0; i < n; ++i) {
            Vector row(0.0f);
            for (int c = 0; c < count; ++c) {
                p[c] = k[i * count + c] * Vector(Rows::at(scalings, i)) * scalings[count + c];
                row = row + p[c];
                columns[c] = columns[c] + p[c];
            }
            all = all + row;
            worst = max(worst, abs(total(row) - 1.0f));
            store_row(p, out + i * n);
        }
        for (int j = 0; j < n; ++j) worst = max(worst, abs(Rows::at(columns, j) - 1.0f));
        *residual = worst;
        return sound(extremes, all);
    }

    LL_FUNCTION bool backward(int iterations, Vector* history, const float* upstream, float* out) const {
        const Extremes<Vector> extremes = normalize<dialect, true>(matrix, iterations, history);
        const Vector *u = history + 2 * count * iterations, *v = u + count;
        Vector sums[most], z[size], all(0.0f);
        for (int c = 0; c < count; ++c) sums[c] = Vector(0.0f);
        for (int i = 0; i < n; ++i) {
            Vector* const row = z + i * count;
            load_row(upstream + i * n, 0.0f, row);
            for (int c = 0; c < count; ++c) {
                const Vector entry = k[i * count + c] * Vector(Rows::at(u, i)) * v[c];
                all = all + entry;
                row[c] = row[c] * entry;
                sums[c] = sums[c] + row[c];
            }
        }
        differentiate<dialect>(matrix, iterations, history, z, sums);
        for (int i = 0; i < n; ++i) {
            Vector* const row = z + i * count;
            if (dialect == Dialect::deepseek)
                through_softmax(count, [&](int c) { return x[i * count + c]; }, k + i * count, row,
                                [](Vector sums) { return Vector(total(sums)); });
            store_row(row, out + i * n);
        }
        return sound(extremes, all);
    }
};

template <Dialect dialect>
void forward_rows(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
        const std::int64_t at = m * call.n * call.n;
        const Single<dialect> matrix(call.logits + at, call.n);
        const bool sound = matrix.forward(call.iterations, call.out + at, call.residual + m);
        if (!sound && dialect != Dialect::deepseek)
            LogDomain(call.n, call.iterations, dialect)
                .forward(call.logits + at, call.out + at, call.residual + m);
    }
}

template <Dialect dialect>
void backward_rows(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const Buffer<Vector> history(2 * Rows::most * (call.iterations + 1));
    for (std::int64_t m = begin; m < end; ++m) {
        const std::int64_t at = m * call.n * call.n;
        const Single<dialect> matrix(call.logits + at, call.n);
        const bool sound = matrix.backward(call.iterations, history.data, call.upstream + at, call.out + at);
        if (!sound && dialect != Dialect::deepseek)
            LogDomain(call.n, call.iterations, dialect)
                .backward(call.logits + at, call.upstream + at, call.out + at);
    }
}

// ------------------------------------------------------------------------------------------------------------ calls

using Do = void (*)(const DoublyStochastic&, std::int64_t begin, std::int64_t end);

// By n: hyper-connections have 4.
template <Dialect dialect>
void forward_of(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const auto small = call.n == 4 ? forward_lanes<dialect, 4> : forward_lanes<dialect, 0>;
    (call.n <= in_lanes ? small : forward_rows<dialect>)(call, begin, end);
}

template <Dialect dialect>
void backward_of(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const auto small = call.n == 4 ? backward_lanes<dialect, 4> : backward_lanes<dialect, 0>;
    (call.n <= in_lanes ? small : backward_rows<dialect>)(call, begin, end);
}

constexpr Do forwards[] = {forward_of<Dialect::exact>, forward_of<Dialect::deepseek>, forward_of<Dialect::megatron>};
constexpr Do backwards[] = {backward_of<Dialect::exact>, backward_of<Dialect::deepseek>,
                            backward_of<Dialect::megatron>};

void forward(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    forwards[static_cast<int>(call.dialect)](call, begin, end);
}

void backward(const DoublyStochastic& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    backwards[static_cast<int>(call.dialect)](call, begin, end);
}

constexpr DoublyStochasticKernels kernels = {forward, backward};

}  // namespace

const DoublyStochasticKernels DoublyStochasticKernels::LL_COPY = kernels;

}  // namespace transport
}  // namespace logitless
