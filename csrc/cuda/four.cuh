// Four adjacent tokens of a thread as one number type of math/number.h: what a recipe chooses is chosen once for them.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../math/elementary.h"

namespace logitless {
namespace {

constexpr int four = 4;

struct Four {
    float at[four];

    Four() = default;
    LL_FUNCTION explicit Four(float x) : at{x, x, x, x} {}
};

struct Flags {
    bool at[four];
};

template <class Result = Four, class Function>
LL_FUNCTION Result each_of_four(const Function& function) {
    Result out;
#pragma unroll
    for (int k = 0; k < four; ++k) out.at[k] = function(k);
    return out;
}

// One instruction each; a NaN is passed on.
LL_FUNCTION float larger_of(float a, float b) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
#else
    return logitless::max(a, b);
#endif
}
LL_FUNCTION float smaller_of(float a, float b) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
#else
    return logitless::min(a, b);
#endif
}

#define LL_EACH(Result, declaration, expression) \
    LL_FUNCTION Result declaration { \
        return each_of_four<Result>([&](int k) { return expression; }); \
    }
LL_EACH(Four, operator+(Four a, Four b), a.at[k] + b.at[k])
LL_EACH(Four, operator-(Four a, Four b), a.at[k] - b.at[k])
LL_EACH(Four, operator*(Four a, Four b), a.at[k] * b.at[k])
LL_EACH(Four, operator/(Four a, Four b), a.at[k] / b.at[k])
LL_EACH(Four, operator-(Four a), -a.at[k])
LL_EACH(Flags, operator>(Four a, Four b), a.at[k] > b.at[k])
LL_EACH(Flags, operator==(Four a, Four b), a.at[k] == b.at[k])
LL_EACH(Flags, operator&(Flags a, Flags b), a.at[k] && b.at[k])
LL_EACH(Flags, operator|(Flags a, Flags b), a.at[k] || b.at[k])
LL_EACH(Flags, operator!(Flags a), !a.at[k])
LL_EACH(Four, select(Flags mask, Four yes, Four no), mask.at[k] ? yes.at[k] : no.at[k])
LL_EACH(Four, fma(Four a, Four b, Four c), logitless::fma(a.at[k], b.at[k], c.at[k]))
LL_EACH(Four, max(Four a, Four b), larger_of(a.at[k], b.at[k]))
LL_EACH(Four, min(Four a, Four b), smaller_of(a.at[k], b.at[k]))
LL_EACH(Four, abs(Four a), logitless::abs(a.at[k]))
LL_EACH(Four, exp(Four a), logitless::exp(a.at[k]))
LL_EACH(Four, expm1(Four a), logitless::expm1(a.at[k]))
LL_EACH(Four, log(Four a), logitless::log(a.at[k]))
LL_EACH(Four, log1p(Four a), logitless::log1p(a.at[k]))
#undef LL_EACH

__device__ __forceinline__ float sum(const Four& x) { return (x.at[0] + x.at[1]) + (x.at[2] + x.at[3]); }
__device__ __forceinline__ float least(const Four& x) {
    return fminf(fminf(x.at[0], x.at[1]), fminf(x.at[2], x.at[3]));
}
__device__ __forceinline__ float largest(const Four& x) {
    return fmaxf(fmaxf(x.at[0], x.at[1]), fmaxf(x.at[2], x.at[3]));
}
__device__ __forceinline__ bool all(const Flags& x) { return x.at[0] && x.at[1] && x.at[2] && x.at[3]; }
__device__ __forceinline__ int count(const Flags& x) { return (x.at[0] + x.at[1]) + (x.at[2] + x.at[3]); }

// x[k] of those k that are there, as one access where all are and the address allows.
template <class To, class T>
__device__ __forceinline__ To load(const T* from, const Flags& there) {
    using Bits = std::conditional_t<sizeof(T) == sizeof(float), uint4, unsigned>;
    if (all(there) && reinterpret_cast<std::uintptr_t>(from) % sizeof(Bits) == 0) {
        To out;
        const Bits bits = *reinterpret_cast<const Bits*>(from);
        std::memcpy(&out, &bits, sizeof bits);
        return out;
    }
    return each_of_four<To>([&](int k) { return there.at[k] ? from[k] : T(0); });
}

template <class From, class T>
__device__ __forceinline__ void store(T* to, const Flags& there, const From& x) {
    using Bits = std::conditional_t<sizeof(T) == sizeof(float), uint4, unsigned>;
    if (all(there) && reinterpret_cast<std::uintptr_t>(to) % sizeof(Bits) == 0) {
        Bits bits;
        std::memcpy(&bits, &x, sizeof bits);
        __stwb(reinterpret_cast<Bits*>(to), bits);
        return;
    }
#pragma unroll
    for (int k = 0; k < four; ++k)
        if (there.at[k]) to[k] = x.at[k];
}

}  // namespace
}  // namespace logitless
