// Whole Sinkhorn runs of small problems, one launch for all, in which each problem stops by itself. The kernel matrix
// of one up to 32 x 32 is in the registers of a warp, that of a larger one in the shared memory of a block.
//
// Stabilised scaling: with potentials phi, gamma of some iteration absorbed into
//
//   K_ij = e^((phi_i + gamma_j - C_ij) / epsilon),   u_i = a_i e^((f_i - phi_i) / epsilon),   v_j alike,
//
// a half-iteration is one product with K, and a logarithm and an exponential per row:
//
//   S_i = sum_j K_ij v_j,   s_i = phi_i - epsilon log S_i,   f_i = rho / (rho + epsilon) s_i.
//
// In the iteration that is returned u comes from the rounded f: so one of the potentials is the other's. Before that,
// where balanced, u_i = a_i / S_i, with less work and no drift.
//
// K is formed anew, from phi_i = min_j (C_ij - g_j) and gamma = g, where a potential has moved by 20 epsilon: an entry
// that K cannot hold is then less than e^-48 of its row. A column that K does not reach at all is summed in the log
// domain, from the cost.
//
// Backward walks the iterations back: the softmax of a half-iteration is W_ij = K_ij u_i / sum_i K_ij u_i, and its
// cotangent of C, sum over halves of W_ij dt_j, is collected as the factor D of K. Where sums leave what float32 holds
// (prices rho far below the potentials) the same walk is done with exponentials of the cost.
//
// `transport` is all in one: the run, <P, C> of its plan P_ij = a_i K_ij columns_j, K of the potentials returned, and
// the walk back from the cotangents of those,
//
//   df_i = sum_j P_ij C_ij / epsilon,   dg_j = (1 / (epsilon l_b) - 1 / rho_b) sum_i P_ij C_ij,
//
// with D_ij = a_i columns_j (1 - C_ij / epsilon) to begin with, what P_ij C_ij owes to C_ij itself.
//
// Memory: C is read once per forming of K (once or twice in a run, as often in backward), [B, n, m] floats, and its
// gradient written once, and read and written again for every K that is given up; per iteration n + m floats of
// history, if kept, which stay on chip in `transport` where they fit. What an iteration costs (B = 1024 and 20
// iterations on 132 processors of 1.75 GHz: 8 problems to each):
//
//   block: 4 n m / 32 readings of K and of vectors by a warp. n = m = 64: 512 cycles of shared memory, 47 us.
//   warp:  a lane holds 8 x 4 entries, so that both products read 12 floats of vectors and exchange 10 partial sums:
//          35 cycles of shared memory with what is a row's or a column's own, 64 FMAs among some 250 instructions, 62
//          cycles of issue slots. n, m <= 16: 4 x 2 entries, 6 floats, 6 sums: 25 and 45 cycles. A block would take 140
//          (75) cycles of shared memory. A problem alone takes the latency of two halves, some 500 cycles of a
//          product, three exchanges, a logarithm and a division: with 8 problems to a processor 6 us, where a block
//          would take 13 (7); backward, two exponentials and four products, twice that.

#include "sinkhorn.h"

#include "launch.cuh"

namespace logitless::cuda {
namespace {

constexpr float furthest = 20;          // epsilons that a potential may move from what K holds
constexpr float smallest = 1e-30f;      // of a sum; below, the log domain
constexpr int most_size = 1024;         // of n and m
constexpr int small_memory = 48 << 10;  // a block's, without asking for more
constexpr int vectors = 7;              // of n and of m floats in shared memory
enum { some, far, lost };               // flags there: of `any`, a potential is far from K, a sum has left float32

template <class Run>
struct Given {
    SinkhornProblems problems;
    Run run;
    int bytes;     // of shared memory for a problem
    bool on_chip;  // where its history is, after all else
};

__host__ __device__ inline int padded(int m) { return m | 1; }  // rows an odd number of floats apart: no collisions

// ------------------------------------------------------------------------------------------ places of K, their threads

struct Place {
    const SinkhornProblems& p;
    const int n, m, problem;

    __device__ __forceinline__ float cost(int i, int j) const {
        return p.cost[problem * p.strides[0] + i * p.strides[1] + j * p.strides[2]];
    }
};

// Shared memory. Thread t of a block does rows and columns t, t + threads, ...
struct Block : Place {
    static constexpr int most_block = 256, at_least = 3;  // threads, and blocks on a processor

    const int stride;
    double* sums;  // a number per warp
    int* flag;
    float *first_row, *first_column, *k, *d;  // vectors; [n, stride], d backward

    static int threads(int n, int m) {
        const int most = n > m ? n : m, rounded = (most + warp_size - 1) / warp_size * warp_size;
        return rounded < most_block ? rounded : most_block;
    }
    static constexpr int together = 1;  // problems of a block
    static int bytes(int n, int m, bool back) {
        return 8 * (most_block / warp_size) + 16 + 4 * ((back ? 2 : 1) * n * padded(m) + vectors * (n + m));
    }

    __device__ Block(const SinkhornProblems& p, unsigned char* memory, int)
        : Place{p, p.n, p.m, static_cast<int>(blockIdx.x)}, stride(padded(p.m)) {
        sums = reinterpret_cast<double*>(memory);
        flag = reinterpret_cast<int*>(sums + most_block / warp_size);
        first_row = reinterpret_cast<float*>(flag + 4);
        first_column = first_row + vectors * n;
        k = first_column + vectors * m;
        d = k + n * stride;
    }
    __device__ float* behind() const { return d + n * stride; }
    __device__ float* row_vector(int number) const { return first_row + number * n; }
    __device__ float* column_vector(int number) const { return first_column + number * m; }
    static __device__ __forceinline__ bool leads() { return threadIdx.x == 0; }
    static __device__ __forceinline__ void synchronize() { __syncthreads(); }

    template <class Function>
    __device__ __forceinline__ void each_row(const Function& function) const {
        for (int i = threadIdx.x; i < n; i += blockDim.x) function(i);
    }
    template <class Function>
    __device__ __forceinline__ void each_column(const Function& function) const {
        for (int j = threadIdx.x; j < m; j += blockDim.x) function(j);
    }
    // function(i, j, C_ij, K_ij, D_ij), as the cost lies in memory, so that its readings are wide.
    template <class Function>
    __device__ __forceinline__ void each_entry(const Function& function) {
        const bool by_rows = p.strides[2] <= p.strides[1];
        const int inner = by_rows ? m : n;
        for (int e = threadIdx.x; e < n * m; e += blockDim.x) {
            const int outside = e / inner, inside = e - outside * inner;
            const int i = by_rows ? outside : inside, j = by_rows ? inside : outside;
            function(i, j, cost(i, j), k[i * stride + j], d[i * stride + j]);
        }
    }
    // function(i, min_j K_ij), function(i, sum_j K_ij x_j), function(j, sum_i K_ij x_i)
    template <class Function>
    __device__ __forceinline__ void each_row_least(const Function& function) const {
        each_row([&](int i) {
            float least = infinity;
            for (int j = 0; j < m; ++j) least = fminf(least, k[i * stride + j]);
            function(i, least);
        });
    }
    template <class Function>
    __device__ __forceinline__ void each_row_sum(const float* x, const Function& function) const {
        each_row([&](int i) { function(i, product(k + i * stride, 1, x, m)); });
    }
    template <class Function>
    __device__ __forceinline__ void each_column_sum(const float* x, const Function& function) const {
        each_column([&](int j) { function(j, product(k + j, stride, x, n)); });
    }
    static __device__ __forceinline__ float product(const float* line, int step, const float* x, int count) {
        float found[4] = {};
        int i = 0;
        for (; i + 4 <= count; i += 4)
#pragma unroll
            for (int c = 0; c < 4; ++c) found[c] = fmaf(line[(i + c) * step], x[i + c], found[c]);
        for (; i < count; ++i) found[0] = fmaf(line[i * step], x[i], found[0]);
        return (found[0] + found[1]) + (found[2] + found[3]);
    }
    // D_ij += x_i y_j
    __device__ __forceinline__ void collect(const float* x, const float* y) {
        each_column([&](int j) {
            const float mine = y[j];
            if (mine != 0.0f)
                for (int i = 0; i < n; ++i) d[i * stride + j] = fmaf(x[i], mine, d[i * stride + j]);
        });
    }

    // Whether one thread says so. One barrier must stand between this and the next.
    __device__ bool any(bool mine) const {
        if (leads()) flag[some] = 0;
        block_barrier<73>();
        if (mine) flag[some] = 1;
        block_barrier<74>();
        return flag[some];
    }

    // The same sum of all threads for all, in the same order always. One barrier must stand between this and the next.
    __device__ double total(double x) {
#pragma unroll
        for (int distance = warp_size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
        if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size] = x;
        block_barrier<51>();
        double found = 0;
        for (int w = 0; w < static_cast<int>(blockDim.x) / warp_size; ++w) found += sums[w];
        return found;
    }
};

// Registers: lane 8 p + q of a warp holds rows p + 4 r and columns q + 8 s, so that its 8 neighbours read what lies
// side by side; 0 beyond the problem, and so are all vectors there. A sum over rows is put together by exchanges, in
// each of which a lane keeps half of its sums: it ends with one row, and one column.
template <int size>
struct Warp : Place {
    static constexpr int most_block = 128, at_least = 3;
    static constexpr int rows = size / 4, columns = size / 8;  // of a lane

    const int lane, p_row, p_column, row, column;
    int* flag;
    float* first;
    float k[rows][columns], d[rows][columns];

    static int threads(int, int) { return most_block; }
    static constexpr int together = most_block / warp_size;
    static int bytes(int, int, bool) { return 16 + 4 * 2 * vectors * size; }

    __device__ Warp(const SinkhornProblems& p, unsigned char* memory, int bytes)
        : Place{p, p.n, p.m, static_cast<int>(blockIdx.x * together + threadIdx.x / warp_size)},
          lane(threadIdx.x % warp_size), p_row(lane / 8), p_column(lane % 8), row(p_row + 4 * (p_column * rows / 8)),
          column(p_column + 8 * (p_row * columns / 4)) {
        flag = reinterpret_cast<int*>(memory + threadIdx.x / warp_size * bytes);
        first = reinterpret_cast<float*>(flag + 4);
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            if (row >= n) row_vector(v)[row] = 0;
            if (column >= m) column_vector(v)[column] = 0;
        }
    }
    __device__ __forceinline__ float* behind() const { return first + 2 * vectors * size; }
    __device__ __forceinline__ float* row_vector(int number) const { return first + number * size; }
    __device__ __forceinline__ float* column_vector(int number) const { return first + (vectors + number) * size; }
    __device__ __forceinline__ bool leads() const { return lane == 0; }
    static __device__ __forceinline__ void synchronize() { __syncwarp(); }

    template <class Function>
    __device__ __forceinline__ void each_row(const Function& function) const {
        if (row < n && p_column * rows % 8 == 0) function(row);
    }
    template <class Function>
    __device__ __forceinline__ void each_column(const Function& function) const {
        if (column < m && p_row * columns % 4 == 0) function(column);
    }
    template <class Function>
    __device__ __forceinline__ void each_entry(const Function& function) {
        float c[rows][columns];
        const float* line = p.cost + problem * p.strides[0] + p_row * p.strides[1] + p_column * p.strides[2];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int s = 0; s < columns; ++s) {
                const int i = p_row + 4 * r, j = p_column + 8 * s;
                c[r][s] = i < n && j < m ? line[8 * s * p.strides[2]] : 0.0f;
            }
            line += 4 * p.strides[1];
        }
#pragma unroll
        for (int r = 0; r < rows; ++r)
#pragma unroll
            for (int s = 0; s < columns; ++s)
                function(p_row + 4 * r, p_column + 8 * s, c[r][s], k[r][s], d[r][s]);
    }
    template <class Function>
    __device__ __forceinline__ void each_row_least(const Function& function) const {
        float least[rows];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            least[r] = k[r][0];
#pragma unroll
            for (int s = 1; s < columns; ++s) least[r] = fminf(least[r], k[r][s]);
        }
        const float mine = joined<Min, 1, 8>(least);
        each_row([&](int i) { function(i, mine); });
    }
    template <class Function>
    __device__ __forceinline__ void each_row_sum(const float* x, const Function& function) const {
        float sums[rows] = {};
#pragma unroll
        for (int s = 0; s < columns; ++s) {
            const float here = x[p_column + 8 * s];
#pragma unroll
            for (int r = 0; r < rows; ++r) sums[r] = fmaf(k[r][s], here, sums[r]);
        }
        const float mine = joined<Add, 1, 8>(sums);
        each_row([&](int i) { function(i, mine); });
    }
    template <class Function>
    __device__ __forceinline__ void each_column_sum(const float* x, const Function& function) const {
        float sums[columns] = {};
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const float here = x[p_row + 4 * r];
#pragma unroll
            for (int s = 0; s < columns; ++s) sums[s] = fmaf(k[r][s], here, sums[s]);
        }
        const float mine = joined<Add, 8, 4>(sums);
        each_column([&](int j) { function(j, mine); });
    }
    // Of `lanes` lanes `step` apart: that of the values which is this lane's.
    template <class Op, int step, int lanes, int count>
    __device__ __forceinline__ float joined(float (&x)[count]) const {
        int left = count;
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            const bool upper = lane & distance * step;
            if (left > 1) {
                left /= 2;
#pragma unroll
                for (int c = 0; c < count / 2; ++c) {
                    if (c >= left) break;
                    const float theirs = upper ? x[c] : x[c + left], mine = upper ? x[c + left] : x[c];
                    x[c] = Op::of(mine, __shfl_xor_sync(~0u, theirs, distance * step));
                }
            } else {
                x[0] = Op::of(x[0], __shfl_xor_sync(~0u, x[0], distance * step));
            }
        }
        return x[0];
    }
    __device__ __forceinline__ void collect(const float* x, const float* y) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const float mine = x[p_row + 4 * r];
#pragma unroll
            for (int s = 0; s < columns; ++s) d[r][s] = fmaf(mine, y[p_column + 8 * s], d[r][s]);
        }
    }

    static __device__ bool any(bool mine) { return __ballot_sync(~0u, mine); }

    static __device__ double total(double x) {
#pragma unroll
        for (int distance = warp_size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
        return x;
    }
};

// ---------------------------------------------------------------------------------------------------------- the solver

// One problem, and what its threads share.
template <class Place>
struct Solver : Place {
    using Place::p, Place::n, Place::m, Place::problem, Place::flag, Place::cost, Place::leads;
    using Place::each_row, Place::each_column, Place::each_entry, Place::each_row_sum, Place::each_column_sum;

    float *const a, *const f, *const u, *const phi, *const row_1, *const row_2, *const row_3;                // [n]
    float *const b, *const g, *const v, *const gamma, *const column_1, *const column_2, *const column_3;  // [m]
    struct {
        float *f = nullptr, *g = nullptr;
        std::int64_t f_step, g_step;
    } history;  // of this problem, if it is kept
    bool collected = false, stored = false;  // something in D, in the cost's gradient

    __device__ Solver(const SinkhornProblems& p, unsigned char* memory, int bytes)
        : Place(p, memory, bytes), a(this->row_vector(0)), f(this->row_vector(1)), u(this->row_vector(2)),
          phi(this->row_vector(3)), row_1(this->row_vector(4)), row_2(this->row_vector(5)), row_3(this->row_vector(6)),
          b(this->column_vector(0)), g(this->column_vector(1)), v(this->column_vector(2)),
          gamma(this->column_vector(3)), column_1(this->column_vector(4)), column_2(this->column_vector(5)),
          column_3(this->column_vector(6)) {}

    __device__ bool begin() {
        if (problem >= p.count) return false;
        each_row([&](int i) { a[i] = p.a[of_rows() + i]; });
        each_column([&](int j) { b[j] = p.b[of_columns() + j]; });
        if (leads()) flag[lost] = 0;
        return true;
    }
    __device__ void keep(float* f, float* g) {
        if (f) history = {f + of_rows(), g + of_columns(), of_rows(1) - of_rows(), of_columns(1) - of_columns()};
    }
    __device__ void keep_on_chip() { history = {this->behind(), this->behind() + p.limit * n, n, m}; }

    __device__ __forceinline__ std::int64_t of_rows(std::int64_t iteration = 0) const {
        return (iteration * p.count + problem) * n;
    }
    __device__ __forceinline__ std::int64_t of_columns(std::int64_t iteration = 0) const {
        return (iteration * p.count + problem) * m;
    }
    __device__ __forceinline__ float& f_at(int iteration, int i) const {
        return history.f[iteration * history.f_step + i];
    }
    __device__ __forceinline__ float& g_at(int iteration, int j) const {
        return history.g[iteration * history.g_step + j];
    }

    template <int number>
    __device__ __forceinline__ void barrier() const {
        if (number != LL_TEST_DROP_BARRIER) Place::synchronize();
    }

    __device__ float epsilon(int iteration) const {
        return iteration < p.annealed_count ? p.annealed[iteration] : p.epsilon;
    }
    static __device__ float damping(float rho, float epsilon) {
        return rho == infinity ? 1.0f : rho / (rho + epsilon);
    }

    // What the plan's marginal should be.
    static __device__ __forceinline__ float optimal(float weight, float potential, float rho) {
        return rho == infinity ? weight : weight * exp(fminf(-potential / rho, 80.0f));
    }

    // u / a of a potential that has moved by x, and what that is where it has moved by -e log sum
    static __device__ __forceinline__ float scaling(float x, float e) { return exp(fminf(x / e, 80.0f)); }
    static __device__ __forceinline__ float reciprocal(float sum) { return fminf(1.0f / sum, 0x1p115f); }

    // K_ij of phi and gamma as they stand, 0 in rows and columns without weight.
    __device__ __forceinline__ float entry(int i, int j, float c, float factor) const {
        const float x = a[i] > 0.0f && b[j] > 0.0f ? ((gamma[j] - c) + phi[i]) * factor : -infinity;
        return exp(fminf(x, 80.0f));
    }
    __device__ void form(float e) {
        const float factor = 1.0f / e;
        each_entry([&](int i, int j, float c, float& k, float&) { k = entry(i, j, c, factor); });
    }

    // K of the potential g; v is b.
    __device__ void absorb(float e) {
        const float factor = 1.0f / e;
        each_entry([&](int, int j, float c, float& k, float&) { k = b[j] > 0.0f ? c - g[j] : infinity; });
        barrier<53>();
        this->each_row_least([&](int i, float least) { phi[i] = least < infinity ? least : 0.0f; });
        each_column([&](int j) {
            gamma[j] = g[j];
            v[j] = b[j];
        });
        barrier<54>();
        each_entry([&](int i, int, float, float& k, float&) {
            k = exp(fminf(a[i] > 0.0f ? (phi[i] - k) * factor : -infinity, 80.0f));
        });
        barrier<55>();
    }

    // -e log sum_i a_i e^((f_i - C_ij) / e), or over j with b and g, from the cost.
    __device__ float softmin_of_column(int j, float e) const {
        return softmin(n, e, [&](int i) { return a[i] > 0.0f ? f[i] - cost(i, j) : -infinity; }, a);
    }
    __device__ float softmin_of_row(int i, float e) const {
        return softmin(m, e, [&](int j) { return b[j] > 0.0f ? g[j] - cost(i, j) : -infinity; }, b);
    }
    template <class X>
    static __device__ float softmin(int count, float e, const X& x, const float* weights) {
        float top = -infinity, sum = 0;
        for (int i = 0; i < count; ++i) top = fmaxf(top, x(i));
        if (top == -infinity) return infinity;
        for (int i = 0; i < count; ++i) sum += times(exp((x(i) - top) / e), weights[i]);
        return -(top + e * ::logf(sum));
    }

    // -------------------------------------------------------------------------------------------------------- forward

    struct Ended {
        int iterations, last;
        bool stopped;
    };

    // The potentials are left in row_1 and column_1, and in column_3 whether they reach a column.
    __device__ Ended solve() {
        float *const best_f = row_1, *const best_g = column_1, *const t = column_2, *const reached = column_3;
        const bool judged = p.tolerance >= 0;
        each_column([&](int j) { g[j] = p.g[of_columns() + j]; });
        float least = infinity, absorbed = 0;  // the smallest residual; the epsilon of K
        int iteration = 0, last = 0;
        bool stopped = false;
        for (bool ended = false; !ended; ++iteration) {
            const float e = epsilon(iteration), of_a = damping(p.rho_a, e), of_b = damping(p.rho_b, e);
            const bool passing = !judged && iteration + 1 < p.limit;  // will not be what is returned
            barrier<56>();
            if (e != absorbed || flag[far]) absorb(e);
            absorbed = e;
            if (leads()) flag[far] = 0;

            double off = 0;
            each_row_sum(v, [&](int i, float sum) {
                const bool live = a[i] > 0.0f, reached = !(sum <= 0.0f);
                f[i] = u[i] = 0.0f;
                if (live && reached) {
                    f[i] = of_a * (phi[i] - e * ::logf(sum));
                    u[i] = a[i] * (passing && of_a == 1.0f ? reciprocal(sum) : scaling(f[i] - phi[i], e));
                } else if (live) {
                    off += a[i];
                }
                if (history.f) f_at(iteration, i) = f[i];
            });
            barrier<58>();
            each_column_sum(u, [&](int j, float sum) {
                const float before = g[j];
                const bool direct = sum < smallest;
                t[j] = direct ? softmin_of_column(j, e) : gamma[j] - e * ::logf(sum);
                const bool live = b[j] > 0.0f && !(t[j] == infinity);
                g[j] = live ? of_b * t[j] : 0.0f;
                if (judged && b[j] > 0.0f) {
                    const float mass = direct ? b[j] * exp((before - t[j]) / e) : v[j] * sum;
                    off += fabsf(mass - optimal(b[j], before, p.rho_b));
                }
                v[j] = !live ? 0.0f
                     : b[j] * (passing && !direct && of_b == 1.0f ? reciprocal(sum) : scaling(g[j] - gamma[j], e));
                if (live && !(fabsf(g[j] - gamma[j]) <= furthest * e)) flag[far] = 1;
                if (history.g) g_at(iteration, j) = g[j];
            });
            ended = iteration + 1 == p.limit;
            bool better = ended;
            if (judged) {
                const double found = this->total(off);
                const float residual = found != found ? infinity : static_cast<float>(found);
                better = residual <= least || iteration <= p.annealed_count;
                if (better) least = residual;
                stopped = iteration >= p.annealed_count && residual <= p.tolerance;
                ended = ended || stopped;
            }
            if (better) {
                last = iteration;
                each_row([&](int i) { best_f[i] = f[i]; });
                each_column([&](int j) {
                    best_g[j] = g[j];
                    reached[j] = !(t[j] == infinity);
                });
            }
        }
        return {iteration, last, stopped};
    }

    // The plan a_i K_ij v_j of potentials of which g is f's: K, exponents of a_i K_ij above 0 taken for 0, and v.
    // function(i, C_ij, K_ij, D_ij) may change both. A column that nothing reaches is 0 in K.
    template <class Function>
    __device__ void plan(const float* f, const float* g, const Function& function) {
        const float of_b = damping(p.rho_b, p.epsilon), factor = 1.0f / p.epsilon;
        each_row([&](int i) { phi[i] = f[i]; });
        each_column([&](int j) {
            gamma[j] = g[j] / of_b;
            v[j] = optimal(b[j], g[j], p.rho_b);
        });
        barrier<60>();
        each_entry([&](int i, int j, float c, float& k, float& d) {
            k = fminf(entry(i, j, c, factor), 1.0f / a[i]);
            function(i, c, k, d);
        });
    }

    __device__ void answer(const SinkhornRun& run) {
        const Ended ended = solve();
        plan(row_1, column_1, [&](int i, float, float& k, float&) { k *= a[i]; });
        barrier<61>();
        each_row_sum(v, [&](int i, float sum) {
            run.f[of_rows() + i] = row_1[i];
            run.rows[of_rows() + i] = sum;
        });
        each_column([&](int j) {
            run.g[of_columns() + j] = column_1[j];
            run.reached[of_columns() + j] = column_3[j] != 0.0f;
        });
        if (leads()) {
            run.iterations[problem] = ended.iterations;
            run.stopped[problem] = ended.stopped;
            if (run.last) run.last[problem] = ended.last;
        }
    }

    // ------------------------------------------------------------------------------------------------------- backward

    // What is collected so far goes to the cost's gradient; K is lost.
    __device__ void flush(float* of_cost) {
        barrier<62>();
        if (!of_cost || !collected) return;
        float* const to = of_cost + of_rows() * m;
        each_entry([&](int i, int j, float, float& k, float& d) {  // all readings, then all writings
            k = times(d, k);
            d = 0;
            if (stored && i < n && j < m) k += to[i * m + j];
        });
        each_entry([&](int i, int j, float, float& k, float&) {
            if (i < n && j < m) to[i * m + j] = k;
        });
        collected = false;
        stored = true;
    }

    // Cotangents of the potentials and of the weights' logarithms.
    struct Cotangents {
        float *f, *log_a, *g, *log_b;
    };

    // Of potentials that something else made use of.
    __device__ void begin_with(const SinkhornRunBackward& run, const Cotangents& of) {
        each_row([&](int i) {
            of.f[i] = run.of_f[of_rows() + i];
            of.log_a[i] = 0;
        });
        each_column([&](int j) {
            of.g[j] = run.of_g[of_columns() + j];
            of.log_b[j] = 0;
        });
        each_entry([&](int, int, float, float&, float& d) { d = 0; });
    }

    // Of <P, C>, which is returned. K is that of the last iteration's columns.
    __device__ double begin_with(const float* f, const float* g, const Cotangents& of) {
        const float e = p.epsilon, factor = 1.0f / e, slope = factor / damping(p.rho_b, e) - 1.0f / p.rho_b;
        plan(f, g, [&](int i, float c, float& k, float& d) {
            d = k;
            k = times(a[i] * k, c);
        });
        each_row([&](int i) { u[i] = 1; });
        barrier<63>();
        double value = 0;
        each_row_sum(v, [&](int i, float sum) {
            of.f[i] = sum * factor;
            of.log_a[i] = sum;
            value += sum;
        });
        each_column_sum(u, [&](int j, float sum) {
            of.log_b[j] = sum * v[j];
            of.g[j] = slope * of.log_b[j];
        });
        barrier<68>();
        each_entry([&](int i, int j, float c, float& k, float& d) {
            k = d;
            d = k == 0.0f ? 0.0f : a[i] * v[j] * (1.0f - c * factor);
        });
        collected = true;
        return this->total(value);
    }

    // Whether all went well; `careful`: K is formed for every half-iteration, so that its sums are 1. `absorbed`: the
    // epsilon of K, 0 if there is none.
    __device__ bool differentiate(const Cotangents& of, const SinkhornGradients& out, int last, float absorbed,
                                  bool careful) {
        float *const by_row = row_3, *const by_column = column_3;
        for (int half = 2 * last + 1; half >= 0; --half) {
            const bool columns = half % 2;  // t from f; else s from the g before
            const int iteration = half / 2;
            const float e = epsilon(iteration), of_a = damping(p.rho_a, e), of_b = damping(p.rho_b, e);
            if (columns) each_row([&](int i) { f[i] = f_at(iteration, i); });
            each_column([&](int j) {
                g[j] = columns ? g_at(iteration, j) / of_b : iteration ? g_at(iteration - 1, j) : p.g[of_columns() + j];
            });
            if (careful || e != absorbed || moved(furthest * e)) {
                flush(out.of_cost);
                each_row([&](int i) { phi[i] = careful && !columns ? reference(softmin_of_row(i, e)) : f[i]; });
                each_column([&](int j) { gamma[j] = careful && columns ? reference(softmin_of_column(j, e)) : g[j]; });
                barrier<65>();
                form(e);
                absorbed = e;
            }
            if (columns) each_row([&](int i) { u[i] = a[i] * scaling(f[i] - phi[i], e); });
            else each_column([&](int j) { v[j] = b[j] * scaling(g[j] - gamma[j], e); });
            barrier<66>();
            if (columns) each_column_sum(u, [&](int j, float sum) {
                by_column[j] = share(b[j] > 0.0f ? of_b * of.g[j] : 0.0f, sum);
            });
            else each_row_sum(v, [&](int i, float sum) {
                by_row[i] = share(a[i] > 0.0f ? of_a * of.f[i] : 0.0f, sum);
                of.f[i] = 0;
            });
            barrier<67>();
            if (out.of_cost) this->collect(columns ? u : by_row, columns ? by_column : v);
            collected = true;
            if (columns) each_row_sum(by_column, [&](int i, float sum) {
                const float y = u[i] * sum;
                of.f[i] -= y;
                of.log_a[i] = fmaf(-e, y, of.log_a[i]);
            });
            else each_column_sum(by_row, [&](int j, float sum) {
                const float z = v[j] * sum;
                of.g[j] = -z;
                of.log_b[j] = fmaf(-e, z, of.log_b[j]);
            });
            if (!careful && flag[lost]) return false;
        }
        flush(out.of_cost);
        if (out.of_a) {
            each_row([&](int i) { out.of_a[of_rows() + i] = a[i] > 0.0f ? of.log_a[i] / a[i] : 0.0f; });
            each_column([&](int j) { out.of_b[of_columns() + j] = b[j] > 0.0f ? of.log_b[j] / b[j] : 0.0f; });
        }
        return true;
    }

    // A cotangent over the sum that its row or column is divided by; 0 where that is empty.
    __device__ __forceinline__ float share(float slope, float sum) {
        if (slope == 0.0f) return 0.0f;
        if (!(sum >= smallest && sum <= 1.0f / smallest)) flag[lost] = 1;
        return sum == 0.0f ? 0.0f : slope / sum;
    }
    static __device__ __forceinline__ float reference(float softmin) { return softmin < infinity ? softmin : 0.0f; }

    // Whether f or g is further from what K holds.
    __device__ bool moved(float most) {
        bool mine = false;
        each_row([&](int i) { mine = mine || (a[i] > 0.0f && !(fabsf(f[i] - phi[i]) <= most)); });
        each_column([&](int j) { mine = mine || (b[j] > 0.0f && !(fabsf(g[j] - gamma[j]) <= most)); });
        return this->any(mine);
    }

    // `begin` gives the epsilon of K. What it does is repeated where a second walk is needed.
    template <class Begin>
    __device__ void differentiate(const SinkhornGradients& out, bool wanted, int last, const Begin& begin) {
        for (bool done = false; !done;) {
            barrier<64>();
            const bool careful = flag[lost];
            collected = stored = false;
            const Cotangents of = {row_1, row_2, column_1, column_2};
            const float absorbed = begin(of);
            done = !wanted || differentiate(of, out, last, absorbed, careful);
        }
    }

    __device__ void answer(const SinkhornRunBackward& run) {
        differentiate(run.gradients, true, run.last[problem], [&](const Cotangents& of) {
            begin_with(run, of);
            return 0.0f;
        });
    }

    __device__ void answer(const SinkhornTransport& run) {
        const int last = solve().last;
        const float* const best_f = history.f ? &f_at(last, 0) : row_1;
        const float* const best_g = history.g ? &g_at(last, 0) : column_1;
        differentiate(run.gradients, history.f, last, [&](const Cotangents& of) {
            const double value = begin_with(best_f, best_g, of);
            if (leads()) run.value[problem] = static_cast<float>(value);
            return p.epsilon;
        });
    }
};

template <class Place, class Run>
__global__ void __launch_bounds__(Place::most_block, Place::at_least) kernel(const __grid_constant__ Given<Run> given) {
    LL_DYN_SMEM(unsigned char, memory);
    Solver<Place> solver(given.problems, memory, given.bytes);
    if (!solver.begin()) return;
    if (std::is_same_v<Run, SinkhornTransport> && given.on_chip) solver.keep_on_chip();
    else solver.keep(given.run.history_f, given.run.history_g);
    solver.answer(given.run);
}

template <class Place, class Run>
cudaError_t launch_in(Given<Run> given, bool back, int number, void* stream) {
    const SinkhornProblems& p = given.problems;
    const OnDevice current(number);
    if (current.error()) return current.error();
    given.bytes = Place::bytes(p.n, p.m, back);
    const std::int64_t with_history = given.bytes + std::int64_t(4) * p.limit * (p.n + p.m);
    given.on_chip = std::is_same_v<Run, SinkhornTransport> && given.run.history_f &&
                    Place::together * with_history <= small_memory;
    if (given.on_chip) given.bytes = static_cast<int>(with_history);
    const int shared = Place::together * given.bytes;
    if (shared > small_memory) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel<Place, Run>),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
    }
    const int blocks = (p.count + Place::together - 1) / Place::together;
    const Launch launch(blocks, Place::threads(p.n, p.m), shared, stream);
    return LL_LAUNCH(&launch.config, (kernel<Place, Run>), given);
}

// In the smallest place.
template <class Run>
int launch(const SinkhornProblems& problems, const Run& run, bool back, int device, void* stream) {
    if (problems.count == 0) return cudaSuccess;
    const int most = problems.n > problems.m ? problems.n : problems.m;
    const Given<Run> given = {problems, run, 0, false};
    return most <= 16   ? launch_in<Warp<16>>(given, back, device, stream)
           : most <= 32 ? launch_in<Warp<32>>(given, back, device, stream)
                        : launch_in<Block>(given, back, device, stream);
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_sinkhorn_fits(int n, int m, int device) {
    return n <= most_size && m <= most_size && Block::bytes(n, m, true) <= Device(device).shared_per_block;
}

extern "C" int logitless_cuda_sinkhorn_run(const SinkhornProblems* problems, const SinkhornRun* run, int device,
                                           void* stream) {
    return launch(*problems, *run, false, device, stream);
}

extern "C" int logitless_cuda_sinkhorn_run_backward(const SinkhornProblems* problems, const SinkhornRunBackward* run,
                                                    int device, void* stream) {
    return launch(*problems, *run, true, device, stream);
}

extern "C" int logitless_cuda_sinkhorn_transport(const SinkhornProblems* problems, const SinkhornTransport* run,
                                                 int device, void* stream) {
    return launch(*problems, *run, true, device, stream);
}
