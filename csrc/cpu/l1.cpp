// The L1 distance between softmaxes, compiled once per instruction set with LL_COPY as the copy's name (setup.py).
//
//   forward    C_ij = sum_v |p_iv - q_jv|, and D_ij = sum_v p_iv sign(p_iv - q_jv)      [problems, n, m]
//   backward   dz_iv = ds_iv/dz_iv p_iv (sum_j G_ij sign(p_iv - q_jv) - sum_j G_ij D_ij)
//
// Some columns of some tokens of both sides become probabilities in cache, and pairs are formed from there: logits are
// read once a pass (those of the other side once per 32 tokens of the own one), and the gradient is written once.
// A pair costs 4 operations forward and 3 backward on whole vectors (a difference, its sign, and a product for each
// sum), an element of either side some 20 a pass.
//
// Probabilities are kept times 2^100: then the difference of any two that matter is above 1 in size, and its sign,
// with 0 where they are equal, is the difference cut to [-1, 1].

#include "transport.h"

#include "sweep.h"

namespace logitless {
namespace transport {
namespace {

constexpr float unit = 0x1p100f;
constexpr int block = L1::block;
constexpr bool wide = width >= 16;  // and 32 registers
constexpr int pair_rows = 2, pair_columns = wide ? 4 : 2;

// The range of columns of a piece, and its own tokens.
struct Piece {
    std::int64_t problem, first, count, begin, end;
};

template <int tile>
LL_FUNCTION Piece piece(const L1& call, std::int64_t index) {
    const std::int64_t segment = index % call.segments, blocks = call.blocks();
    const std::int64_t problem = index / call.segments / blocks, first = index / call.segments % blocks * block;
    const std::int64_t tiles = (call.columns + tile - 1) / tile;
    const std::int64_t end = tiles * (segment + 1) / call.segments * tile;
    return {problem, first, call.own.tokens - first < block ? call.own.tokens - first : block,
            tiles * segment / call.segments * tile, end < call.columns ? end : call.columns};
}

// Probabilities, times `unit`, of `count` tokens from the first, in columns [begin, begin + columns); 0 up to a whole
// vector, and in more tokens up to a multiple of `multiple`.
template <int tile>
LL_FUNCTION void fill(const Probabilities& side, std::int64_t first, int count, int multiple, std::int64_t begin,
                      int columns, float (*to)[tile]) {
    for (int i = 0; i < count; ++i) {
        const std::int64_t token = first + i;
        const Row row(side.chunk, token);
        const Vector top(finite(static_cast<float>(side.max[token])));
        const Vector factor(static_cast<float>(unit / side.sum[token]));
        if (columns % width) Vector(0.0f).store(to[i] + columns / width * width);
        sweep(0, columns, [&](std::int64_t j, auto access) {
            prefetch(row.z + begin + j);
            access.store(exp(row.scaled(access, begin + j).s - top) * factor, to[i] + j);
        });
    }
    for (int i = count; i % multiple; ++i)
        for (int j = 0; j < columns; j += width) Vector(0.0f).store(to[i] + j);
}

LL_FUNCTION Vector sign(Vector difference) { return cut_to_one(difference); }

// ---------------------------------------------------------------------------------------------------------- forward

constexpr int forward_tile = 64 * width;  // so many additions to a lane before a sum goes on in double

template <bool moments>
LL_FUNCTION void pairs(const float (*p)[forward_tile], const float (*q)[forward_tile], int columns,
                       float (&costs)[pair_rows][pair_columns], float (&all_moments)[pair_rows][pair_columns]) {
    Vector cost[pair_rows][pair_columns], moment[pair_rows][pair_columns];
    for (int i = 0; i < pair_rows; ++i)
        for (int j = 0; j < pair_columns; ++j) cost[i][j] = moment[i][j] = Vector(0.0f);
    for (int v = 0; v < columns; v += width) {
        Vector own[pair_rows];
        for (int i = 0; i < pair_rows; ++i) own[i] = Vector::load(p[i] + v);
        for (int j = 0; j < pair_columns; ++j) {
            const Vector other = Vector::load(q[j] + v);
            for (int i = 0; i < pair_rows; ++i) {
                const Vector difference = own[i] - other, s = sign(difference);
                cost[i][j] = fma(s, difference, cost[i][j]);
                if (moments) moment[i][j] = fma(s, own[i], moment[i][j]);
            }
        }
    }
    for (int i = 0; i < pair_rows; ++i)
        for (int j = 0; j < pair_columns; ++j) {
            costs[i][j] = total(cost[i][j]);
            all_moments[i][j] = moments ? total(moment[i][j]) : 0.0f;
        }
}

template <bool moments>
void forward_piece(const L1& call, std::int64_t index) {
    alignas(64) float p[block][forward_tile], q[block][forward_tile];
    const Piece part = piece<forward_tile>(call, index);
    const std::int64_t n = call.own.tokens, m = call.other.tokens;
    const std::int64_t at = ((index % call.segments * call.problems + part.problem) * n + part.first) * m;
    double* const cost = call.cost + at;
    double* const moment = moments ? call.moment + at : nullptr;
    std::memset(cost, 0, part.count * m * sizeof(double));
    if constexpr (moments) std::memset(moment, 0, part.count * m * sizeof(double));

    for (std::int64_t begin = part.begin; begin < part.end; begin += forward_tile) {
        const int columns = static_cast<int>(part.end - begin < forward_tile ? part.end - begin : forward_tile);
        fill(call.own, part.problem * n + part.first, static_cast<int>(part.count), pair_rows, begin, columns, p);
        for (std::int64_t first = 0; first < m; first += block) {
            const int others = static_cast<int>(m - first < block ? m - first : block);
            fill(call.other, part.problem * m + first, others, pair_columns, begin, columns, q);
            for (int i = 0; i < part.count; i += pair_rows)
                for (int j = 0; j < others; j += pair_columns) {
                    float costs[pair_rows][pair_columns], all_moments[pair_rows][pair_columns];
                    pairs<moments>(p + i, q + j, columns, costs, all_moments);
                    for (int k = 0; k < pair_rows && i + k < part.count; ++k)
                        for (int l = 0; l < pair_columns && j + l < others; ++l) {
                            cost[(i + k) * m + first + j + l] += costs[k][l] * (1.0 / unit);
                            if (moments) moment[(i + k) * m + first + j + l] += all_moments[k][l] * (1.0 / unit);
                        }
                }
        }
    }
}

// --------------------------------------------------------------------------------------------------------- backward

constexpr int backward_tile = 256;
constexpr int own_rows = wide ? 4 : 2, own_vectors = 2;  // of a bar at a time, in registers
static_assert(backward_tile % (own_vectors * width) == 0);

// bar_iv += sum_j g_ji sign(p_iv - q_jv), rows of g `block` apart
LL_FUNCTION void signs(const float (*p)[backward_tile], const float (*q)[backward_tile], const float* g, int others,
                       int columns, float (*bar)[backward_tile]) {
    for (int v = 0; v < columns; v += own_vectors * width) {
        Vector own[own_rows][own_vectors], sum[own_rows][own_vectors];
        for (int i = 0; i < own_rows; ++i)
            for (int k = 0; k < own_vectors; ++k) {
                own[i][k] = Vector::load(p[i] + v + k * width);
                sum[i][k] = Vector(0.0f);
            }
        for (int j = 0; j < others; ++j) {
            Vector other[own_vectors];
            for (int k = 0; k < own_vectors; ++k) other[k] = Vector::load(q[j] + v + k * width);
            for (int i = 0; i < own_rows; ++i) {
                const Vector factor(g[j * block + i]);
                for (int k = 0; k < own_vectors; ++k)
                    sum[i][k] = fma(factor, sign(own[i][k] - other[k]), sum[i][k]);
            }
        }
        for (int i = 0; i < own_rows; ++i)
            for (int k = 0; k < own_vectors; ++k) {
                float* const to = bar[i] + v + k * width;
                (Vector::load(to) + sum[i][k]).store(to);
            }
    }
}

void backward_piece(const L1Backward& call, std::int64_t index) {
    alignas(64) float p[block][backward_tile], q[block][backward_tile], bar[block][backward_tile], g[block][block];
    const Piece part = piece<backward_tile>(call, index);
    const std::int64_t n = call.own.tokens, m = call.other.tokens;
    const Matrices& x = call.matrices;
    const float* const gradient =
        x.gradient + part.problem * x.gradient_strides[0] + part.first * x.gradient_strides[1];
    const double* const moment = x.moment + part.problem * x.moment_strides[0] + part.first * x.moment_strides[1];
    float expected[block];
    for (int i = 0; i < part.count; ++i) {
        double sum = 0;
        for (std::int64_t j = 0; j < m; ++j)
            sum += static_cast<double>(gradient[i * x.gradient_strides[1] + j * x.gradient_strides[2]]) *
                   moment[i * x.moment_strides[1] + j * x.moment_strides[2]];
        expected[i] = static_cast<float>(sum);
    }

    for (std::int64_t begin = part.begin; begin < part.end; begin += backward_tile) {
        const int columns = static_cast<int>(part.end - begin < backward_tile ? part.end - begin : backward_tile);
        fill(call.own, part.problem * n + part.first, static_cast<int>(part.count), own_rows, begin, columns, p);
        std::memset(bar, 0, part.count * sizeof(bar[0]));
        for (std::int64_t first = 0; first < m; first += block) {
            const int others = static_cast<int>(m - first < block ? m - first : block);
            fill(call.other, part.problem * m + first, others, 1, begin, columns, q);
            for (int j = 0; j < others; ++j)
                for (int i = 0; i < part.count; ++i)
                    g[j][i] = gradient[i * x.gradient_strides[1] + (first + j) * x.gradient_strides[2]];
            for (int i = 0; i < part.count; i += own_rows)
                signs(p + i, q, &g[0][i], others, columns, bar + i);
        }
        for (int i = 0; i < part.count; ++i) {
            const std::int64_t token = part.problem * n + part.first + i;
            const Row row(call.own.chunk, token);
            const bool constant = !row.capped;
            float* const out = call.out + token * call.out_stride + begin;
            const Vector mean(expected[i]);
            sweep(0, columns, [&](std::int64_t v, auto access) {
                const Vector slope = constant ? Vector(row.outer) : row.scaled(access, begin + v).slope;
                const Vector probability = Vector(1 / unit) * Vector::load(p[i] + v);
                access.store(slope * (probability * (Vector::load(bar[i] + v) - mean)), out + v);
            });
        }
    }
}

// Every piece of a call, and the copy's entry in transport.h.

void forward(const L1& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    for (std::int64_t index = begin; index < end; ++index)
        call.moment ? forward_piece<true>(call, index) : forward_piece<false>(call, index);
}

void backward(const L1Backward& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    for (std::int64_t index = begin; index < end; ++index) backward_piece(call, index);
}

constexpr L1Kernels kernels = {forward, backward};

}  // namespace

const L1Kernels L1Kernels::LL_COPY = kernels;

}  // namespace transport
}  // namespace logitless
