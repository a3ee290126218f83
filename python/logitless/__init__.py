"""logitless: losses of LLM post-training straight from hidden states and the lm_head weight."""

from logitless.logits import DenseLogits, LinearLogits
from logitless.ops.functional import cross_entropy, divergence, linear_cross_entropy
from logitless.ops.logprobs import TokenStats, logprobs
from logitless.ops.loss import LossResult
from logitless.terms import CrossEntropy, Divergence, Entropy, LogProb, Objective, Term, ZLoss, row_term

__version__ = "0.1.0"
__all__ = [
    "CrossEntropy",
    "DenseLogits",
    "Divergence",
    "Entropy",
    "LinearLogits",
    "LogProb",
    "LossResult",
    "Objective",
    "Term",
    "TokenStats",
    "ZLoss",
    "cross_entropy",
    "divergence",
    "linear_cross_entropy",
    "logprobs",
    "row_term",
]
