// Vector: the number type (number.h) of the CPU kernels, one register of the instruction set this copy is compiled for.
//
// Arithmetic is GCC's and Clang's vector extension, which knows every architecture; what it has no spelling for, or
// does not always find the one instruction for, is written out below.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../math/number.h"

#if defined(__AVX512F__)
#define LL_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define LL_VECTOR_BYTES 32
#else
#define LL_VECTOR_BYTES 16
#endif

namespace logitless {
namespace {

typedef float Floats __attribute__((vector_size(LL_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(LL_VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(LL_VECTOR_BYTES), aligned(4), may_alias));

struct Vector {
    static constexpr int size = LL_VECTOR_BYTES / sizeof(float);

    Floats v;

    Vector() = default;
    LL_FUNCTION Vector(Floats v) : v(v) {}
    LL_FUNCTION explicit Vector(float x) : v(x - Floats{}) {}

    static LL_FUNCTION Vector load(const float* from) { return {*reinterpret_cast<const LooseFloats*>(from)}; }
    LL_FUNCTION void store(float* to) const { *reinterpret_cast<LooseFloats*>(to) = v; }
};

struct Mask {
    Ints v;  // -1 where true, 0 where false
};

struct Bits {
    Ints v;
};

LL_FUNCTION Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
LL_FUNCTION Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
LL_FUNCTION Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
LL_FUNCTION Vector operator/(Vector a, Vector b) { return {a.v / b.v}; }
LL_FUNCTION Vector operator-(Vector a) { return {-a.v}; }

LL_FUNCTION Mask operator>(Vector a, Vector b) { return {a.v > b.v}; }
LL_FUNCTION Mask operator==(Vector a, Vector b) { return {a.v == b.v}; }
LL_FUNCTION Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
LL_FUNCTION Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
LL_FUNCTION Mask operator!(Mask a) { return {~a.v}; }
LL_FUNCTION Vector select(Mask mask, Vector yes, Vector no) { return {mask.v ? yes.v : no.v}; }

LL_FUNCTION Bits operator&(Bits a, std::int32_t b) { return {a.v & b}; }
LL_FUNCTION Bits operator|(Bits a, Bits b) { return {a.v | b.v}; }
LL_FUNCTION Bits operator-(Bits a, std::int32_t b) { return {a.v - b}; }
LL_FUNCTION Bits operator-(std::int32_t a, Bits b) { return {a - b.v}; }
LL_FUNCTION Bits operator<<(Bits a, int n) { return {a.v << n}; }
LL_FUNCTION Bits operator>>(Bits a, int n) { return {a.v >> n}; }
LL_FUNCTION Bits as_int(Vector x) { return {reinterpret_cast<Ints>(x.v)}; }
LL_FUNCTION Vector as_float(Bits bits) { return {reinterpret_cast<Floats>(bits.v)}; }
LL_FUNCTION Vector to_float(Bits i) { return {__builtin_convertvector(i.v, Floats)}; }

#if defined(__AVX512F__)
LL_FUNCTION Vector max(Vector a, Vector b) { return {_mm512_mask_max_ps(a.v, -1, a.v, b.v)}; }
LL_FUNCTION Vector min(Vector a, Vector b) { return {_mm512_mask_min_ps(a.v, -1, a.v, b.v)}; }
LL_FUNCTION Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
#elif defined(__AVX2__) && defined(__FMA__)
LL_FUNCTION Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
LL_FUNCTION Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.v, b.v)}; }
LL_FUNCTION Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#elif defined(__x86_64__)
LL_FUNCTION Vector max(Vector a, Vector b) { return {_mm_max_ps(a.v, b.v)}; }
LL_FUNCTION Vector min(Vector a, Vector b) { return {_mm_min_ps(a.v, b.v)}; }
LL_FUNCTION Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
#else
LL_FUNCTION Vector max(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }
LL_FUNCTION Vector min(Vector a, Vector b) { return {a.v < b.v ? a.v : b.v}; }
#if defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
LL_FUNCTION Vector fma(Vector a, Vector b, Vector c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
#else
LL_FUNCTION Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
#endif
#endif

// 1 / x, to one unit in the last place, and 0 at 0.
#if defined(__AVX512F__)
LL_FUNCTION Vector reciprocal(Vector x) {
    const Vector y = {_mm512_maskz_rcp14_ps(-1, x.v)};  // a division takes four times as long
    return select(x == Vector(0.0f), Vector(0.0f), fma(y, fma(-x, y, Vector(1.0f)), y));
}
#else
LL_FUNCTION Vector reciprocal(Vector x) { return select(x == Vector(0.0f), Vector(0.0f), {Vector(1.0f).v / x.v}); }
#endif

// x cut to [-1, 1].
#if defined(__AVX512DQ__)
LL_FUNCTION Vector cut_to_one(Vector x) { return {_mm512_range_ps(x.v, _mm512_set1_ps(1.0f), 0b0010)}; }
#else
LL_FUNCTION Vector cut_to_one(Vector x) { return max(min(x, Vector(1.0f)), Vector(-1.0f)); }
#endif

LL_FUNCTION float total(Vector x) {
#if defined(__AVX512F__)
    const __m512 half = x.v + _mm512_mask_shuffle_f32x4(x.v, -1, x.v, x.v, 0x4e);
    const __m512 quarter = half + _mm512_mask_shuffle_f32x4(half, -1, half, half, 0xb1);
    const __m512 two = quarter + _mm512_mask_permute_ps(quarter, -1, quarter, 0x4e);
    return two[0] + two[1];
#else
    float lanes[Vector::size];
    x.store(lanes);
    for (int n = Vector::size / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    return lanes[0];
#endif
}

LL_FUNCTION float largest(Vector x) {
    float lanes[Vector::size];
    x.store(lanes);
    for (int n = Vector::size / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] = max(lanes[i + n], lanes[i]);
    return lanes[0];
}

// The wanted lanes of x, one after the other; how many they are. A whole vector of memory may be written.
LL_FUNCTION int compress(Mask wanted, Vector x, float* to) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __mmask16 bits = _mm512_movepi32_mask(reinterpret_cast<__m512i>(wanted.v));
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(bits, x.v));
    return __builtin_popcount(bits);
#else
    int count = 0;
    for (int i = 0; i < Vector::size; ++i) {
        to[count] = x.v[i];
        count -= wanted.v[i];
    }
    return count;
#endif
}

// The first `count` numbers, and 0 in the other lanes; the rest of memory is not touched.
LL_FUNCTION Vector load_first(const float* from, int count) {
    if (count == Vector::size) return Vector::load(from);
    float lanes[Vector::size] = {};
    std::memcpy(lanes, from, count * sizeof(float));
    return Vector::load(lanes);
}
LL_FUNCTION void store_first(Vector v, float* to, int count) {
    if (count == Vector::size) return v.store(to);
    float lanes[Vector::size];
    v.store(lanes);
    std::memcpy(to, lanes, count * sizeof(float));
}

// Which of the first `count` lanes are wanted; a null pointer: all of them.
LL_FUNCTION Mask load_first(const bool* from, int count) {
    typedef unsigned char Bytes __attribute__((vector_size(Vector::size)));
    Bytes bytes = {};
    if (from) {
        std::memcpy(&bytes, from, count);
    } else {
        std::memset(&bytes, 1, count);
    }
    return {__builtin_convertvector(bytes, Ints) != 0};
}

// A running sum of vectors, such as those of a block's sums: lanes in double, added up at the end.
struct Sum {
    double lanes[Vector::size] = {};

    LL_FUNCTION void add(Vector v) {
        float values[Vector::size];
        v.store(values);
        for (int i = 0; i < Vector::size; ++i) lanes[i] += values[i];
    }
    // factor * (this + shift * other); a factor of 0 gives 0
    void rescale(double factor, double shift, const Sum& other) {
        for (int i = 0; i < Vector::size; ++i)
            lanes[i] = factor == 0 ? 0 : factor * (lanes[i] + shift * other.lanes[i]);
    }
    double total() const {
        double sum = 0;
        for (double lane : lanes) sum += lane;
        return sum;
    }
};

}  // namespace
}  // namespace logitless
