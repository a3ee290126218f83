// What the kernels on chunks of logits share: rows of a chunk, and walks over their columns.

#pragma once

#include "rows.h"

#include "simd.h"

namespace logitless {
namespace {

constexpr float infinity = __builtin_inff();
constexpr int width = Vector::size;
constexpr int ahead = 1024;  // floats: the distance of prefetches

LL_FUNCTION void prefetch(const float* from) { __builtin_prefetch(from + ahead); }

LL_FUNCTION float finite(float maximum) { return maximum == -infinity ? 0.0f : maximum; }

// Denormals count as zero while this lives: products of small probabilities would be slow otherwise (elementary.h).
class FlushDenormals {
#if defined(__SSE__)
    const unsigned saved = _mm_getcsr();

public:
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#else
public:
    FlushDenormals() {}
#endif
};

// How a vector at a column is read and written: all of it, or its first columns at the end of a row.
struct Whole {
    LL_FUNCTION Vector load(const float* from) const { return Vector::load(from); }
    LL_FUNCTION void store(Vector v, float* to) const { v.store(to); }
    LL_FUNCTION Vector only(Vector v, float = 0) const { return v; }
};

struct Part {
    int count;

    LL_FUNCTION Vector load(const float* from) const { return load_first(from, count); }
    LL_FUNCTION void store(Vector v, float* to) const { store_first(v, to, count); }
    LL_FUNCTION Vector only(Vector v, float others = 0) const {
        float lanes[width];
        Vector(others).store(lanes);
        store(v, lanes);
        return Vector::load(lanes);
    }
};

// body(column, access) for every vector of [begin, end).
template <class Body>
LL_FUNCTION void sweep(std::int64_t begin, std::int64_t end, const Body& body) {
    std::int64_t j = begin;
    for (; j + width <= end; j += width) body(j, Whole{});
    if (j < end) body(j, Part{static_cast<int>(end - j)});
}

// One row of a chunk.
struct Row {
    const float* z;
    const float* bias;
    float outer, inner, floor;
    bool capped, filtered;

    LL_FUNCTION Row(const Chunk& chunk, std::int64_t row)
        : z(chunk.z + row * chunk.stride), bias(chunk.bias), outer(chunk.outer[row]), inner(chunk.inner),
          floor(chunk.floor ? chunk.floor[row] : -infinity), capped(chunk.capped), filtered(chunk.floor) {}

    struct Scaled {
        Vector s, slope;  // slope = ds/dz
    };

    template <class Access>
    LL_FUNCTION Vector raw(Access access, std::int64_t j) const {
        const Vector x = access.load(z + j);
        return bias ? x + access.load(bias + j) : x;
    }
    template <bool filterable = true, class Access>  // false: where the caller knows that there is no floor
    LL_FUNCTION Scaled scaled(Access access, std::int64_t j) const {
        const Vector x = raw(access, j);
        if (!capped) return kept<filterable>(x, {Vector(outer) * x, Vector(outer)});
        const Vector y = tanh(Vector(inner) * x);
        return kept<filterable>(x, {Vector(outer) * y, Vector(outer * inner) * fma(-y, y, Vector(1.0f))});
    }
    template <bool filterable>
    LL_FUNCTION Scaled kept(Vector x, Scaled all) const {
        if (!filterable || !filtered) return all;
        const Vector s = select(Vector(floor) > x, Vector(-infinity), all.s);
        return {s, select(s == Vector(-infinity), Vector(0.0f), all.slope)};
    }
};

}  // namespace
}  // namespace logitless
