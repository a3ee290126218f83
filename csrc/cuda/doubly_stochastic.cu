// Doubly stochastic matrices (math/doubly_stochastic.h), forward and backward, one launch each.
//
// Steps over rows and over columns in turn are the halves of a run. Backward needs u and v of every half and no matrix:
// the run is repeated, and they are kept in shared memory, `kept` halves at a time; longer runs are repeated for every
// so many.
//
// In "exact" K = e^(x - f - g), maxima of rows and columns 0, and v starts at e^g. An entry that K cannot hold would
// come back once u or v has grown by as much: a run in which one leaves 2^-40 .. 2^40 is done again with -log u, -log v
// and log K.
//
// [M, n, n] floats are read once (twice with a gradient) and written once. n <= 4: a matrix per thread, in registers;
// M = 32768, n = 4: 4.2 MB (6.3 MB), 1.4 us (2.1 us) at 3.0 TB/s, and 40 halves of some 60 dependent cycles, 1.4 us.
// Larger n: 64 / n matrices per block, in shared memory, a thread per row and column.

#include "doubly_stochastic.h"

#include "launch.cuh"

namespace logitless::cuda {
namespace {

constexpr float most = 0x1p40f, least = 0x1p-40f;  // of u and v in "exact"
constexpr int block_size = 64;                     // of matrices, where each has a thread

struct Matrices {
    DoublyStochastic call;
    int kept;  // halves in shared memory

    __device__ int halves() const { return 2 * call.iterations - (call.dialect == Dialect::deepseek); }
    __device__ bool of_rows(int half) const { return (half + (call.dialect == Dialect::deepseek)) % 2 == 0; }
};

// What a half makes of one row's u (or one column's v) and of `sum`, that of K times the other vector.
template <bool logarithmic>
__device__ __forceinline__ float divided(Dialect dialect, float old, float sum) {
    if (logarithmic) return sum;  // of exponentials the log already
    return sum < 0x1p-126f ? 1.0f : next_scaling(dialect, old, sum);  // 1: a sum of nothing
}

template <bool logarithmic>
__device__ __forceinline__ float entry(float k, float u, float v) {
    return logarithmic ? exp(k - u - v) : k * u * v;
}

// sum_j k_j v_j over n places that `k` and `v` give; log sum_j e^(k_j - v_j), 0 for an empty sum.
template <bool logarithmic, class K, class V>
__device__ __forceinline__ float summed(int n, const K& k, const V& v) {
    float sum = 0;
    if (logarithmic) {
        float top = -infinity;
#pragma unroll
        for (int j = 0; j < n; ++j) top = fmaxf(top, k(j) - v(j));
        top = finite(top);
#pragma unroll
        for (int j = 0; j < n; ++j) sum += exp(k(j) - v(j) - top);
        return sum == 0.0f ? top : top + ::logf(sum);
    }
    float sums[4] = {};  // as of many places rounding would be that of a long chain
#pragma unroll
    for (int j = 0; j < n; ++j) sums[j % 4] = fmaf(k(j), v(j), sums[j % 4]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A row of dL/dx from A, of deepseek.
__device__ __forceinline__ void back_to_logits(int n, const float* x, const float* k, float* a) {
    float top = -infinity, sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) top = fmaxf(top, x[j]);
    top = finite(top);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += exp(x[j] - top);
    const float factor = reciprocal(sum);
    through_softmax(n, [&](int j) { return exp(x[j] - top) * factor; }, k, a, [](float total) { return total; });
}

// ------------------------------------------------------------------------------------------------- a matrix per thread

template <int n>
struct Registers {
    float k[n][n], u[n], v[n], first_v[n];

    template <bool logarithmic>
    __device__ __forceinline__ void begin(const float* logits, Dialect dialect) {
#pragma unroll
        for (int i = 0; i < n; ++i)
#pragma unroll
            for (int j = 0; j < n; ++j) k[i][j] = logits[i * n + j];
#pragma unroll
        for (int j = 0; j < n; ++j) u[j] = v[j] = first_v[j] = logarithmic ? 0.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            float top = -infinity, sum = 0;
#pragma unroll
            for (int j = 0; j < n; ++j) top = fmaxf(top, k[i][j]);
            top = finite(top);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                k[i][j] -= top;
                if (dialect != Dialect::exact) sum += k[i][j] = exp(k[i][j]);
            }
            if (dialect == Dialect::deepseek) {
#pragma unroll
                for (int j = 0; j < n; ++j) k[i][j] = k[i][j] / sum + dialect_eps;
            }
        }
        if (dialect != Dialect::exact) return;
#pragma unroll
        for (int j = 0; j < n; ++j) {
            float top = -infinity;
#pragma unroll
            for (int i = 0; i < n; ++i) top = fmaxf(top, k[i][j]);
            top = finite(top);
            v[j] = first_v[j] = logarithmic ? -top : exp(top);
#pragma unroll
            for (int i = 0; i < n; ++i) k[i][j] = logarithmic ? k[i][j] - top : exp(k[i][j] - top);
        }
    }

    // The matrix as a half sees it: its own vector x, the other y, K with the half's own index first.
    template <bool of_rows>
    __device__ __forceinline__ float& at(int i, int j) {
        return of_rows ? k[i][j] : k[j][i];
    }
    template <bool of_rows>
    __device__ __forceinline__ float (&own())[n] {
        if constexpr (of_rows) return u;
        else return v;
    }
    template <bool of_rows, bool logarithmic>
    __device__ __forceinline__ float sum_of(int i) {
        return summed<logarithmic>(n, [&](int j) { return at<of_rows>(i, j); }, [&](int j) { return own<!of_rows>()[j]; });
    }

    template <bool of_rows, bool logarithmic>
    __device__ __forceinline__ void half(Dialect dialect) {
        float(&x)[n] = own<of_rows>();
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = divided<logarithmic>(dialect, x[i], sum_of<of_rows, logarithmic>(i));
    }

    // Back through a half, for A; `before` is what the half has changed.
    template <bool of_rows, bool logarithmic>
    __device__ __forceinline__ void back(float (&a)[n][n], const float (&before)[n], Dialect dialect) {
        float(&x)[n] = own<of_rows>();
        float(&y)[n] = own<!of_rows>();
#pragma unroll
        for (int i = 0; i < n; ++i) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < n; ++j) sum += of_rows ? a[i][j] : a[j][i];
            sum = live(dialect, before[i], x[i], sum);
#pragma unroll
            for (int j = 0; j < n; ++j)
                (of_rows ? a[i][j] : a[j][i]) -= entry<logarithmic>(at<of_rows>(i, j), x[i], y[j]) * sum;
            x[i] = before[i];
        }
    }

    __device__ __forceinline__ bool fits() const {
        bool found = true;
#pragma unroll
        for (int i = 0; i < n; ++i) found = found && !(fminf(u[i], v[i]) < least || fmaxf(u[i], v[i]) > most);
        return found;
    }
};

// The u or v of every half of a piece of the run, of this thread.
template <int n>
struct History {
    float* at;  // [halves, n, threads]

    __device__ __forceinline__ void put(int slot, const float (&x)[n]) const {
#pragma unroll
        for (int i = 0; i < n; ++i) at[(slot * n + i) * blockDim.x + threadIdx.x] = x[i];
    }
    __device__ __forceinline__ void get(int slot, float (&x)[n]) const {
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = at[(slot * n + i) * blockDim.x + threadIdx.x];
    }
};

// The result, into `out`. False if the run must be done again in logarithms.
template <int n, bool logarithmic>
__device__ bool result_of(const Matrices& given, std::int64_t matrix) {
    const DoublyStochastic& call = given.call;
    Registers<n> m;
    m.template begin<logarithmic>(call.logits + matrix * n * n, call.dialect);
    bool fits = true;
    for (int h = 0; h < given.halves(); ++h) {
        if (given.of_rows(h)) m.template half<true, logarithmic>(call.dialect);
        else m.template half<false, logarithmic>(call.dialect);
        if (!logarithmic && h % 2 == 1) fits = fits && m.fits();
    }
    if (!logarithmic && call.dialect == Dialect::exact && !fits) return false;
    float* const out = call.out + matrix * n * n;
    float worst = 0, columns[n] = {};
#pragma unroll
    for (int i = 0; i < n; ++i) {
        float row = 0;
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const float p = entry<logarithmic>(m.k[i][j], m.u[i], m.v[j]);
            out[i * n + j] = p;
            row += p;
            columns[j] += p;
        }
        const float off = fabsf(row - 1);
        worst = off > worst || off != off ? off : worst;
    }
#pragma unroll
    for (int j = 0; j < n; ++j) {
        const float off = fabsf(columns[j] - 1);
        worst = off > worst || off != off ? off : worst;
    }
    if (call.residual) call.residual[matrix] = worst;
    return true;
}

// The gradient of the logits, into `out`.
template <int n, bool logarithmic>
__device__ bool gradient_of(const Matrices& given, std::int64_t matrix, float* memory) {
    const DoublyStochastic& call = given.call;
    const History<n> history{memory};
    const float* const logits = call.logits + matrix * n * n;
    Registers<n> m;
    float a[n][n];
    for (int end = given.halves(); end > 0;) {
        const int begin = end > given.kept ? end - (given.kept - 2) : 0;  // the halves that are gone back through now
        const int first = begin < 2 ? 0 : begin - 2;                     // of those that are kept
        m.template begin<logarithmic>(logits, call.dialect);
        bool fits = true;
        for (int h = 0; h < end; ++h) {
            if (given.of_rows(h)) {
                m.template half<true, logarithmic>(call.dialect);
                if (h >= first) history.put(h - first, m.u);
            } else {
                m.template half<false, logarithmic>(call.dialect);
                if (h >= first) history.put(h - first, m.v);
            }
            if (!logarithmic && h % 2 == 1) fits = fits && m.fits();
        }
        if (end == given.halves()) {
            if (!logarithmic && call.dialect == Dialect::exact && !fits) return false;
            const float* const gradient = call.gradient + matrix * n * n;
#pragma unroll
            for (int i = 0; i < n; ++i)
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    const float p = entry<logarithmic>(m.k[i][j], m.u[i], m.v[j]);
                    a[i][j] = times(p, gradient[i * n + j]);
                }
        }
        for (int h = end - 1; h >= begin; --h) {
            const bool rows = given.of_rows(h);
            float before[n];
#pragma unroll
            for (int i = 0; i < n; ++i) before[i] = !rows ? m.first_v[i] : logarithmic ? 0.0f : 1.0f;
            if (h >= 2) history.get(h - 2 - first, before);
            if (rows) m.template back<true, logarithmic>(a, before, call.dialect);
            else m.template back<false, logarithmic>(a, before, call.dialect);
        }
        end = begin;
    }
    float* const out = call.out + matrix * n * n;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        if (call.dialect == Dialect::deepseek) back_to_logits(n, logits + i * n, m.k[i], a[i]);
#pragma unroll
        for (int j = 0; j < n; ++j) out[i * n + j] = a[i][j];
    }
    return true;
}

template <int n, bool differentiate>
__global__ void __launch_bounds__(block_size) thread_kernel(const __grid_constant__ Matrices given) {
    LL_DYN_SMEM(float, memory);
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * block_size;
    for (std::int64_t matrix = blockIdx.x * static_cast<std::int64_t>(block_size) + threadIdx.x;
         matrix < given.call.matrices; matrix += step) {
        if constexpr (differentiate) {
            if (!gradient_of<n, false>(given, matrix, memory)) gradient_of<n, true>(given, matrix, memory);
        } else {
            if (!result_of<n, false>(given, matrix)) result_of<n, true>(given, matrix);
        }
    }
}

// --------------------------------------------------------------------------------------------- some matrices per block

// In shared memory: K and, backward, A, with rows an odd number of floats apart, so that neither rows nor columns of
// threads collide. Thread i of a matrix does row i and column i. All matrices of a block take the same steps.
struct Resident {
    const Matrices& given;
    int n, stride, index;  // in this thread's matrix
    std::int64_t matrix;
    float *k, *a, *u, *v, *first_v, *factors, *history;
    int* failed;

    static __host__ __device__ int matrices(int n) { return block_size / n; }
    static __host__ __device__ int floats(int n, int kept) { return 2 * n * (n | 1) + 4 * n + kept * n; }

    __device__ Resident(const Matrices& given, float* memory, std::int64_t first)
        : given(given), n(given.call.n), stride(n | 1), index(static_cast<int>(threadIdx.x) % n),
          matrix(first + static_cast<int>(threadIdx.x) / n),
          k(memory + 1 + static_cast<int>(threadIdx.x) / n * floats(n, given.kept)), a(k + n * stride),
          u(a + n * stride), v(u + n), first_v(v + n), factors(first_v + n), history(factors + n),
          failed(reinterpret_cast<int*>(memory)) {}

    __device__ __forceinline__ bool mine() const {
        return static_cast<int>(threadIdx.x) < matrices(n) * n && matrix < given.call.matrices;
    }
    __device__ __forceinline__ float& row(float* x, int j) const { return x[index * stride + j]; }
    __device__ __forceinline__ float& column(float* x, int i) const { return x[i * stride + index]; }
    template <class Function>
    __device__ __forceinline__ void each_entry(const Function& function) const {
        if (!mine()) return;
        for (int e = index; e < n * n; e += n) function(matrix * n * n + e, e / n, e % n);
    }

    template <bool logarithmic>
    __device__ void begin() {
        const int t = index;
        const Dialect dialect = given.call.dialect;
        each_entry([&](std::int64_t e, int i, int j) { k[i * stride + j] = given.call.logits[e]; });
        if (threadIdx.x == 0) *failed = 0;
        if (mine()) u[t] = v[t] = first_v[t] = logarithmic ? 0.0f : 1.0f;
        block_barrier<40>();
        if (mine()) {
            float top = -infinity, sum = 0;
            for (int j = 0; j < n; ++j) top = fmaxf(top, row(k, j));
            top = finite(top);
            for (int j = 0; j < n; ++j) {
                float& x = row(k, j);
                x -= top;
                if (dialect != Dialect::exact) sum += x = exp(x);
            }
            if (dialect == Dialect::deepseek)
                for (int j = 0; j < n; ++j) row(k, j) = row(k, j) / sum + dialect_eps;
        }
        block_barrier<41>();
        if (dialect != Dialect::exact) return;
        if (mine()) {
            float top = -infinity;
            for (int i = 0; i < n; ++i) top = fmaxf(top, column(k, i));
            top = finite(top);
            v[t] = first_v[t] = logarithmic ? -top : exp(top);
            for (int i = 0; i < n; ++i) {
                float& x = column(k, i);
                x = logarithmic ? x - top : exp(x - top);
            }
        }
        block_barrier<42>();
    }

    template <bool logarithmic>
    __device__ __forceinline__ float sum_of(bool of_rows) {
        return of_rows ? summed<logarithmic>(n, [&](int j) { return row(k, j); }, [&](int j) { return v[j]; })
                       : summed<logarithmic>(n, [&](int i) { return column(k, i); }, [&](int i) { return u[i]; });
    }

    // The halves up to `end`; those from `first` on are kept.
    template <bool logarithmic>
    __device__ void run(int end, int first) {
        for (int h = 0; h < end; ++h) {
            const bool rows = given.of_rows(h);
            if (mine()) {
                float& x = (rows ? u : v)[index];
                x = divided<logarithmic>(given.call.dialect, x, sum_of<logarithmic>(rows));
                if (h >= first) history[(h - first) * n + index] = x;
                if (!logarithmic && h > 0 && (x < least || x > most)) *failed = 1;
            }
            block_barrier<43>();
        }
    }

    template <bool logarithmic>
    __device__ bool refused() const {
        const bool found = !logarithmic && given.call.dialect == Dialect::exact && *failed;
        block_barrier<50>();  // all have read it before the run begins again
        return found;
    }

    template <bool logarithmic>
    __device__ bool result_of() {
        const DoublyStochastic& call = given.call;
        begin<logarithmic>();
        run<logarithmic>(given.halves(), given.halves());
        if (refused<logarithmic>()) return false;
        each_entry([&](std::int64_t e, int i, int j) {
            float& x = k[i * stride + j];
            call.out[e] = x = entry<logarithmic>(x, u[i], v[j]);
        });
        block_barrier<44>();
        if (mine()) {
            float rows = 0, columns = 0;
            for (int j = 0; j < n; ++j) {
                rows += row(k, j);
                columns += column(k, j);
            }
            const float off_rows = fabsf(rows - 1), off_columns = fabsf(columns - 1);
            factors[index] = off_columns > off_rows || off_columns != off_columns ? off_columns : off_rows;
        }
        block_barrier<45>();
        if (mine() && index == 0 && call.residual) {
            float worst = 0;
            for (int i = 0; i < n; ++i) worst = factors[i] > worst || factors[i] != factors[i] ? factors[i] : worst;
            call.residual[matrix] = worst;
        }
        return true;
    }

    template <bool logarithmic>
    __device__ bool gradient_of() {
        const DoublyStochastic& call = given.call;
        for (int end = given.halves(); end > 0;) {
            const int begin_at = end > given.kept ? end - (given.kept - 2) : 0;
            const int first = begin_at < 2 ? 0 : begin_at - 2;
            begin<logarithmic>();
            run<logarithmic>(end, first);
            if (end == given.halves()) {
                if (refused<logarithmic>()) return false;
                each_entry([&](std::int64_t e, int i, int j) {
                    a[i * stride + j] = times(entry<logarithmic>(k[i * stride + j], u[i], v[j]), call.gradient[e]);
                });  // a thread's entries are its column's, and the last half is one of columns
            }
            for (int h = end - 1; h >= begin_at; --h) back<logarithmic>(h, first);
            end = begin_at;
        }
        if (call.dialect == Dialect::deepseek) {  // through K = softmax + eps
            if (mine())
                back_to_logits(n, call.logits + (matrix * n + index) * n, k + index * stride, a + index * stride);
            block_barrier<47>();
        }
        each_entry([&](std::int64_t e, int i, int j) { call.out[e] = a[i * stride + j]; });
        return true;
    }

    // Back through one half.
    template <bool logarithmic>
    __device__ void back(int h, int first) {
        const bool rows = given.of_rows(h);
        const int t = index;
        if (mine()) {
            const float before =
                h >= 2 ? history[(h - 2 - first) * n + t] : !rows ? first_v[t] : logarithmic ? 0.0f : 1.0f;
            float sum = 0;
            for (int j = 0; j < n; ++j) sum += rows ? row(a, j) : column(a, j);
            const float own = (rows ? u : v)[t];
            sum = live(given.call.dialect, before, own, sum);
            for (int j = 0; j < n; ++j) {
                float& x = rows ? row(a, j) : column(a, j);
                x -= entry<logarithmic>(rows ? row(k, j) : column(k, j), own, (rows ? v : u)[j]) * sum;
            }
            (rows ? u : v)[t] = before;
        }
        block_barrier<48>();
    }
};

template <bool differentiate>
__global__ void __launch_bounds__(block_size) block_kernel(const __grid_constant__ Matrices given) {
    LL_DYN_SMEM(float, memory);
    const int together = Resident::matrices(given.call.n);
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * together; first < given.call.matrices;
         first += static_cast<std::int64_t>(gridDim.x) * together) {
        Resident matrices(given, memory, first);
        if constexpr (differentiate) {
            if (!matrices.gradient_of<false>()) matrices.gradient_of<true>();
        } else {
            if (!matrices.result_of<false>()) matrices.result_of<true>();
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- launches

constexpr int most_kept = 64;

template <class Kernel>
cudaError_t launch(const Matrices& given, Kernel kernel, std::int64_t blocks, int threads, std::size_t shared,
                   const Device& device, void* stream) {
    if (shared > 48 << 10) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    const std::int64_t largest = 64 * static_cast<std::int64_t>(device.processors);
    const Launch launch(static_cast<unsigned>(blocks < largest ? blocks : largest), threads, shared, stream);
    return LL_LAUNCH(&launch.config, kernel, given);
}

template <int n>
cudaError_t launch_threads(Matrices given, const Device& device, void* stream) {
    const bool back = given.call.gradient;
    const std::int64_t blocks = (given.call.matrices + block_size - 1) / block_size;
    const std::size_t shared = back ? sizeof(float) * given.kept * n * block_size : 0;
    return launch(given, back ? thread_kernel<n, true> : thread_kernel<n, false>, blocks, block_size, shared, device,
                  stream);
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_doubly_stochastic(const DoublyStochastic* call, int number, void* stream) {
    if (call->n < 1 || call->n > 64 || call->iterations < 1) return cudaErrorInvalidValue;
    if (call->matrices == 0) return cudaSuccess;
    const OnDevice current(number);
    if (current.error()) return current.error();
    const Device device(number);
    Matrices given = {*call, 0};
    const int halves = 2 * call->iterations;
    given.kept = halves < most_kept ? halves : most_kept;
    switch (call->n) {
        case 1: return launch_threads<1>(given, device, stream);
        case 2: return launch_threads<2>(given, device, stream);
        case 3: return launch_threads<3>(given, device, stream);
        case 4: return launch_threads<4>(given, device, stream);
    }
    const int together = Resident::matrices(call->n);
    const std::size_t shared = sizeof(float) * (1 + together * Resident::floats(call->n, given.kept));
    return launch(given, call->gradient ? block_kernel<true> : block_kernel<false>,
                  (call->matrices + together - 1) / together, block_size, shared, device, stream);
}
