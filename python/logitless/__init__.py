"""logitless: losses of LLM post-training straight from hidden states and the lm_head weight."""

from logitless import cache, decoding
from logitless.logits import DenseLogits, LinearLogits, TopKLogits
from logitless.losses import classification, contrastive, distillation, marginal, policy, preference, transport
from logitless.ops.functional import cross_entropy, divergence, linear_cross_entropy
from logitless.ops.logprobs import TokenStats, logprobs
from logitless.ops.loss import LossResult
from logitless.ops.mean_probability import mean_probability
from logitless.ops.sinkhorn import (
    DoublyStochastic,
    PointCost,
    ProbabilityCost,
    SinkhornDivergence,
    SinkhornResult,
    doubly_stochastic,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_routing,
)
from logitless.ops.topk import topk, topk_logprobs
from logitless.support import KeepIds, MinP, TopK, TopP
from logitless.terms import CrossEntropy, Divergence, Entropy, LogProb, Objective, Term, ZLoss, f_divergence, row_term

__version__ = "0.1.0"
__all__ = [
    "CrossEntropy",
    "DenseLogits",
    "Divergence",
    "DoublyStochastic",
    "Entropy",
    "KeepIds",
    "LinearLogits",
    "LogProb",
    "LossResult",
    "MinP",
    "Objective",
    "PointCost",
    "ProbabilityCost",
    "SinkhornDivergence",
    "SinkhornResult",
    "Term",
    "TokenStats",
    "TopK",
    "TopKLogits",
    "TopP",
    "ZLoss",
    "cache",
    "classification",
    "contrastive",
    "cross_entropy",
    "decoding",
    "distillation",
    "divergence",
    "doubly_stochastic",
    "f_divergence",
    "linear_cross_entropy",
    "logprobs",
    "marginal",
    "mean_probability",
    "policy",
    "preference",
    "row_term",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_routing",
    "topk",
    "topk_logprobs",
    "transport",
]
