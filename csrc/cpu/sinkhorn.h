// Entropic optimal transport for float32 on a CPU: python/logitless/ops/sinkhorn/kernels.py says what is computed.
//
// A cost is a matrix whose rows are `stride` floats apart and whose columns are adjacent; a transposed one is read down
// its columns. Every function below does a range of rows, or of columns, of one problem.

#pragma once

#include "../math/number.h"

namespace logitless {
namespace sinkhorn {

// Rows and columns of scratch are padded to whole vectors of any copy, and sums down columns are those of pieces of so
// many rows, joined in order: what they give does not depend on the threads that do them.
constexpr std::int64_t lanes = 16, piece = 128;

namespace {
LL_FUNCTION std::int64_t padded(std::int64_t count) { return (count + lanes - 1) / lanes * lanes; }
LL_FUNCTION std::int64_t pieces(std::int64_t rows) { return (rows + piece - 1) / piece; }
}  // namespace

struct Matrix {
    const float* at;
    std::int64_t stride;
    std::int64_t rows, columns;
};

// Along rows: top_i = max_j (c_j - C_ij), 0 where all are -inf, and total_i = sum_j exp((c_j - C_ij - top_i) /
// epsilon). Down columns alike, with one entry of c per row.
struct Softmin {
    Matrix cost;
    const float* c;
    float inverse;  // 1 / epsilon
    float *top, *total;
};

// With E_ij = exp(min(0, (c_j - C_ij + r_i) / epsilon)) and M = E or, for power 1, E C (0 where E is); there C is
// C_ij - origin_j, if there is one:
struct Plan {
    Matrix cost;
    const float *r, *c;
    float inverse;
    int power, count;
    const float* across;  // [count, columns]: row_sums_ik = sum_j M_ij across_kj
    float* row_sums;      // [rows, count], null if not wanted
    const float* down;    // [rows, count]: column_sums_kj = sum_i M_ij down_ik
    float* column_sums;   // [pieces, count, padded(columns)] of each piece of rows, null if not wanted
    // gradient_ij = (E_slope E_ij + EC_slope E_ij C_ij) sum_k left_ik right_kj, null if not wanted
    float E_slope, EC_slope;
    const float *left, *right;  // [rows, count], [count, columns]
    float* gradient;            // [rows, columns]
    const float* origin;        // [columns]
};

// cost_ij = sum_k |x_ik - y_kj|, or its Euclidean counterpart: differences first, not products.
struct Pairs {
    const float* x;  // [rows, dimensions]
    const float* y;  // [dimensions, columns]
    std::int64_t rows, columns, dimensions;
    bool euclidean;
    float* cost;  // [rows, columns]
};

// out_ik = sum_j gradient_ij sign(x_ik - y_kj)
struct Signs {
    const float *gradient, *x, *y;  // as there
    std::int64_t rows, columns, dimensions;
    float* out;  // [rows, dimensions]
};

// One side of a whole run: rho / (rho + epsilon) and 1 / (rho + epsilon); balanced: 1 and 0.
struct Side {
    bool balanced;
    float rho, damping, rate;
};

// One problem of a whole run, in a stretch of iterations of one epsilon: its *segment* has the origins (s, g) and
//
//     E_ij = b_j exp((s_i + g_j - C_ij) / epsilon), rows of sum 1      scale_i = a_i exp((l_a s_i - s_i) / epsilon)
//
// and its iterations are S_i = sum_j E_ij v_j, u_i = S_i^-l_a, T_j = sum_i scale_i u_i E_ij, and the next v_j from T_j.
// Vectors are padded with 0, v with 1.
struct Work {
    Matrix cost;
    std::int64_t n, m;  // padded
    float epsilon, inverse;
    Side a, b;
    float *weights_a, *weights_b;
    float* E;            // [n, m]
    float *s, *scale, *S, *r, *x;  // [n]
    float *g, *c, *v, *next, *T, *p;  // [m]
    float* reached;      // [m], 0 or 1
    float* partial;      // [pieces, m]
};

// What a backward iteration has besides: cotangents and what they become.
struct Backward {
    Work work;
    const float* of_f;        // [n], of the iteration that was returned, else null
    bool given;               // x = sum_j W_ij dt_j is there already (of a half-iteration in the log domain)
    float *log_a, *log_b;     // [n], [m]: cotangents of the logarithms of the weights, added to
    float *u, *q;             // [n]: the factors of rows in dL/dC = E * sum over iterations of (u p + q v)
};

// Once per instruction set: sinkhorn.cpp.
struct Kernels {
    void (*softmin_rows)(const Softmin&, std::int64_t begin, std::int64_t end);
    void (*softmin_columns)(const Softmin&, std::int64_t begin, std::int64_t end);
    void (*plan)(const Plan&, std::int64_t begin, std::int64_t end);  // whole pieces

    void (*pairs)(const Pairs&, std::int64_t begin, std::int64_t end);
    void (*signs)(const Signs&, std::int64_t begin, std::int64_t end);

    // to = from + epsilon log weights, -inf where the weight is 0
    void (*weighted)(const float* from, const float* weights, float epsilon, std::int64_t count, float* to);
    void (*absorb)(const Work&, std::int64_t begin, std::int64_t end);   // rows: E, s and scale, from c
    void (*iterate)(const Work&, std::int64_t piece);                    // S, and sums of T, from v
    bool (*columns)(const Work&, double* residual);                      // T and next; whether they are in range
    void (*row_potentials)(const Work&, const float* S, float* f);       // l_a (s - epsilon log S)
    void (*column_potentials)(const Work&, const float* v, float* g);    // g + epsilon log v
    void (*row_sums)(const Work&, std::int64_t begin, std::int64_t end, float* rows);  // of the plan, from v and S

    void (*factors)(const Work&);                                        // v, from the T of the iteration before
    void (*iterate_back)(const Backward&, std::int64_t piece);           // x or p to u and q, and sums of E^T q
    void (*columns_back)(const Backward&, float* of_g);                  // -v E^T q
    void (*add_back)(const Work&, std::int64_t begin, std::int64_t end, std::int64_t count, const float* us,
                     const float* vs, float* gradient, bool first);      // rows of gradient (+)= E * us^T vs
    // a half-iteration over columns in the log domain: x, and gradient += W p; c has the tops, next 1 / totals
    void (*log_back)(const Work&, std::int64_t begin, std::int64_t end, float* gradient);

    static const Kernels baseline, avx2, avx512;  // copies.h
};

}  // namespace sinkhorn
}  // namespace logitless
