// Doubly stochastic matrices by alternating normalisation, and the exact gradient of a finite run.
//
// A run keeps its matrix as P_ij = K_ij u_i v_j, K fixed: normalising rows changes u, normalising columns v. With s the
// row sums of K_ij v_j, and t = u s those of P,
//
//   exact      u' = 1 / s                       K = exp(x - row maximum), x the logits
//   deepseek   u' = u / (t + eps)               K = softmax(x) + eps; the first iteration has no row step
//   megatron   u' = u / max(t, eps)             K = exp(x - row maximum)
//
// and alike for v from the columns of u_i K_ij. Backward, with Z the cotangent of log P: from after a row step, which
// left P', to before it,
//
//   Z_ij -= P'_ij sum_j Z_ij      (megatron: where t was not raised to eps)
//
// so all that a run must remember are u and v of every step. Errors of Z are normalised away as Z itself is.
//
// A Layout says how a matrix lies in numbers of type T: an n-vector is `count` of them.

#pragma once

#include "elementary.h"

namespace logitless {

enum class Dialect { exact, deepseek, megatron };
constexpr const char* dialect_names[] = {"exact", "deepseek", "megatron"};

namespace {

constexpr float dialect_eps = 1e-6f;  // of deepseek and megatron

// u' from u and s.
template <class T>
LL_FUNCTION T next_scaling(Dialect dialect, T old, T sum) {
    const T eps(dialect_eps);
    if (dialect == Dialect::deepseek) return old * reciprocal(fma(old, sum, eps));
    if (dialect == Dialect::megatron) return old * reciprocal(max(eps, old * sum));
    return reciprocal(sum);
}

// sum_j Z_ij, or 0 where u' does not depend on s.
template <class T>
LL_FUNCTION T live(Dialect dialect, T old, T next, T sum) {
    if (dialect != Dialect::megatron) return sum;
    return select(old * T(1 - dialect_eps) > next * T(dialect_eps), sum, T(0.0f));
}

// A row of Z of the logits from that of K = p + eps, where p(j) is their softmax; total(x) is what T has of a row.
template <class T, class Softmax, class Total>
LL_FUNCTION void through_softmax(int count, const Softmax& p, const T* k, T* z, const Total& total) {
    T mean(0.0f);
    for (int j = 0; j < count; ++j) {
        z[j] = z[j] * p(j) * reciprocal(k[j]);
        mean = mean + z[j];
    }
    mean = total(mean);
    for (int j = 0; j < count; ++j) z[j] = fma(-p(j), mean, z[j]);
}

// n^2 numbers T, each of a matrix of its own: k[i n + j]. `fixed`: n, or 0 if it is known at run time only.
template <class Number, int fixed, int largest>
struct Lanes {
    using T = Number;
    static constexpr int most = fixed ? fixed : largest;
    const T* k;
    int size;

    LL_FUNCTION int count() const { return fixed ? fixed : size; }

    // to_i = sum_j K_ij x_j
    LL_FUNCTION void rows(const T* x, T* to) const {
        const int n = count();
        for (int i = 0; i < n; ++i) {
            T sum = k[i * n] * x[0];
            for (int j = 1; j < n; ++j) sum = fma(k[i * n + j], x[j], sum);
            to[i] = sum;
        }
    }
    // to_j = sum_i x_i K_ij
    LL_FUNCTION void columns(const T* x, T* to) const {
        const int n = count();
        for (int j = 0; j < n; ++j) {
            T sum = k[j] * x[0];
            for (int i = 1; i < n; ++i) sum = fma(k[i * n + j], x[i], sum);
            to[j] = sum;
        }
    }
    // x, and `other` where it is not of the matrix
    static LL_FUNCTION T only(int, T x, T) { return x; }
    // Z_ij -= K_ij x_i y_j, and the sums of its rows, or columns, then
    LL_FUNCTION void rows_after(const T* x, const T* y, T* z, T* sums) const {
        const int n = count();
        for (int i = 0; i < n; ++i) {
            sums[i] = T(0.0f);
            for (int j = 0; j < n; ++j) {
                z[i * n + j] = fma(-(k[i * n + j] * x[i]), y[j], z[i * n + j]);
                sums[i] = sums[i] + z[i * n + j];
            }
        }
    }
    LL_FUNCTION void columns_after(const T* x, const T* y, T* z, T* sums) const {
        const int n = count();
        for (int j = 0; j < n; ++j) sums[j] = T(0.0f);
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) {
                z[i * n + j] = fma(-(k[i * n + j] * x[i]), y[j], z[i * n + j]);
                sums[j] = sums[j] + z[i * n + j];
            }
    }
};

template <class T>
struct Extremes {
    T least = T(1.0f), largest = T(1.0f);

    LL_FUNCTION void see(T x) {
        least = min(least, x);
        largest = max(largest, x);
    }
};

// The scalings of a run. `history` [iterations + 1, 2, count] starts with ones and gets those after every iteration;
// with `keeps` unset it has room for one, and holds the last.
template <Dialect dialect, bool keeps, class Layout, class T = typename Layout::T>
LL_FUNCTION Extremes<T> normalize(const Layout& matrix, int iterations, T* history) {
    const int count = matrix.count();
    for (int i = 0; i < 2 * count; ++i) history[i] = T(1.0f);
    Extremes<T> extremes;
    T sums[Layout::most];
    const auto step = [&](const T* old, T* next) {
        for (int i = 0; i < count; ++i) {
            next[i] = matrix.only(i, next_scaling(dialect, old[i], sums[i]), T(1.0f));
            extremes.see(next[i]);
        }
    };
    for (int t = 0; t < iterations; ++t) {
        T *old = history, *next = keeps ? history + 2 * count : history;
        if (dialect == Dialect::deepseek && t == 0) {
            for (int i = 0; i < count; ++i) next[i] = old[i];
        } else {
            matrix.rows(old + count, sums);
            step(old, next);
        }
        matrix.columns(next, sums);
        step(old + count, next + count);
        history = next;
    }
    return extremes;
}

// Z of K from that of P, whose column sums are `sums`; `history` as of normalize.
template <Dialect dialect, class Layout, class T = typename Layout::T>
LL_FUNCTION void differentiate(const Layout& matrix, int iterations, const T* history, T* z, T* sums) {
    const int count = matrix.count();
    T factors[Layout::most];
    const auto close = [&](const T* old, const T* next) {
        for (int i = 0; i < count; ++i) factors[i] = live(dialect, old[i], next[i], sums[i] * next[i]);
    };
    for (int t = iterations; t > 0; --t) {
        const T *old = history + 2 * count * (t - 1), *next = old + 2 * count;
        close(old + count, next + count);
        matrix.rows_after(next, factors, z, sums);
        if (dialect == Dialect::deepseek && t == 1) break;
        close(old, next);
        matrix.columns_after(factors, old + count, z, sums);
    }
}

}  // namespace
}  // namespace logitless
