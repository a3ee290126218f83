// Which copy of the kernels in csrc/cpu is in use. Those files are compiled once per instruction set (COPIES in
// setup.py), and each makes a copy of its table:
//
//     struct L1Kernels { ...; static const L1Kernels baseline, avx2, avx512; };     its header
//     const L1Kernels L1Kernels::LL_COPY = kernels;                                 the file, of its own constant
//     constexpr InUse<L1Kernels> kernels;                                           whoever calls kernels->...
//
// For code that is compiled once: of an inline function the linker keeps one, which must run everywhere.

#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace logitless {

enum class Isa { baseline, avx2, avx512 };  // a processor that has one has those before it
constexpr const char* isa_names[] = {"baseline", "avx2", "avx512"};

inline Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : Isa::avx2;
#else
    return Isa::baseline;
#endif
}

inline Isa isa = best_isa();

template <class Kernels>
struct InUse {
    const Kernels* operator->() const {
#if defined(__x86_64__)
        if (isa == Isa::avx512) return &Kernels::avx512;
        if (isa == Isa::avx2) return &Kernels::avx2;
#endif
        return &Kernels::baseline;
    }
};

inline std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = static_cast<int>(best_isa()); i >= 0; --i) names.push_back(isa_names[i]);
    return names;
}

inline void force_isa(const std::string& name) {
    for (int i = static_cast<int>(best_isa()); i >= 0; --i)
        if (name == isa_names[i]) {
            isa = static_cast<Isa>(i);
            return;
        }
    throw std::invalid_argument("no copy '" + name + "' that this processor can run");
}

}  // namespace logitless
