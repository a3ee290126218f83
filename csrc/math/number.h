// What the formulas of csrc/math ask of a number type T, stated for float.
//
// Formulas are templates on T: float on a GPU or in a scalar loop, a whole vector (csrc/cpu/simd.h) in a CPU kernel.
// T is constructed from float, has + - * /, unary -, the comparisons > and == (which give a mask, that has & | !), and
// the functions below. Everything has internal linkage: one source is compiled once per instruction set, and the linker
// must never take one copy's function for another's.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LL_FUNCTION __host__ __device__ __forceinline__
#else
#define LL_FUNCTION inline __attribute__((always_inline))
#endif

namespace logitless {
namespace {

// a b + c, rounded once where the machine can; formulas must not rely on it.
LL_FUNCTION float fma(float a, float b, float c) {
#if defined(__CUDACC__)
    return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// A NaN in b is passed on; one in a is not. The order of the arguments is that of the one-instruction forms.
LL_FUNCTION float max(float a, float b) { return a > b ? a : b; }
LL_FUNCTION float min(float a, float b) { return a < b ? a : b; }

LL_FUNCTION float select(bool mask, float yes, float no) { return mask ? yes : no; }

LL_FUNCTION std::int32_t as_int(float x) {
    std::int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
LL_FUNCTION float as_float(std::int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
LL_FUNCTION float to_float(std::int32_t i) { return static_cast<float>(i); }

}  // namespace
}  // namespace logitless
