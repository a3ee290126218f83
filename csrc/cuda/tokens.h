// The token objective of python/logitless/ops/tokens/recipe.py on a CUDA device; launchers are as in rows.h.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/policy.h"

namespace logitless::cuda {

struct TokenCall {
    TokenRecipe recipe;
    std::int64_t tokens, sequences;
    const float* inputs[TokenRecipe::most_slots];  // by slot
    unsigned per_sequence;                         // bits: the slots that are [sequences], not [tokens]
    const bool* mask;                              // [tokens], null means all
    const std::int64_t* offsets;                   // [sequences + 1], null means no sequences
    const float* denominator;
    double* results;        // Recipe.results, in that order
    float* slopes;          // [gradients, tokens], without norm and what comes through sums; null: not wanted
    bool* through;          // [tokens]: whether that reaches a token. For ratios of sequences
    double* workspace;      // logitless_cuda_token_workspace numbers
    unsigned* ticket;       // 0, as it is again afterwards; for no other call meanwhile
    const float* upstream;  // of the backward
    float* out;             // [gradients, tokens], of the backward
};

}  // namespace logitless::cuda

extern "C" {
// The workspace of a call of these sizes. What logitless_cuda_tokens leaves there its backward reads.
std::size_t logitless_cuda_token_workspace(const logitless::cuda::TokenCall* call, int device);
int logitless_cuda_tokens(const logitless::cuda::TokenCall* call, int device, void* stream);
int logitless_cuda_tokens_backward(const logitless::cuda::TokenCall* call, int device, void* stream);
}
