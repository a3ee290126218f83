// The token kernel of python/logitless/ops/tokens on a CPU. A null pointer is an input not given.

#pragma once

#include <cstdint>

#include "../math/policy.h"

namespace logitless {

struct TokenCall {
    const TokenRecipe* recipe;
    std::int64_t tokens, sequences;
    const float* inputs[TokenRecipe::most_slots];  // [tokens], or per sequence
    bool per_sequence[TokenRecipe::most_slots];
    const bool* mask;             // [tokens]
    const std::int64_t* offsets;  // [sequences + 1]; null: no sequences
    bool wanted;
    float* derivatives[TokenRecipe::most_gradients];  // [tokens]: of the loss divided by its norm
};

// Sums over some of the tokens.
struct TokenSums {
    double tokens, sequences;                           // that count; with tokens that count
    double policy, penalties[TokenRecipe::most_penalties];  // with weights
    double low, high, k1, k3, ratio, entropy, factor, kept;
    float least, most;  // of the ratio
};

// Units of work: fixed pieces of the tokens, or the sequences that begin in them. Their sums are added in order.
constexpr std::int64_t token_unit = 4096;

inline std::int64_t token_units(const TokenCall& call) { return call.tokens / token_unit + 1; }

struct TokenKernels {  // tokens.cpp, once per instruction set
    void (*tokens)(const TokenCall&, std::int64_t unit, TokenSums*);

    static const TokenKernels baseline, avx2, avx512;  // copies.h
};

}  // namespace logitless
