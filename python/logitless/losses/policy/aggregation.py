"""From losses per token to one number: weights that add up to the wanted mean.

``loss = sum_t weight_t * loss_t``, whatever the mode, so losses of micro-batches with a common denominator add up to
the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.inputs import Slots, Tokens

MODES = {
    "token-sum": "tokens",
    "token-mean": "tokens",
    "dapo": "tokens",
    "bnpo": "tokens",
    "seq-mean-token-sum": "sequences",
    "seq-mean-token-mean": "sequences",
    "seq-mean-token-sum-norm": "sequences",
}


@dataclass(frozen=True)
class Aggregation:
    """How losses per token l_t become one, m the mask, w the weights, |o_i| the tokens of sequence i under the mask.

    =======================  ==========================================  ==============================================
    mode                     loss                                        who
    =======================  ==========================================  ==============================================
    token-sum                sum m w l                                   verl
    token-mean               sum m w l / N, N tokens                     verl's default, NeMo-RL, open-instruct
    dapo                     token-mean; the denominator must be given   TRL's dapo, cispo, vespo
    bnpo                     token-mean over this call's own tokens      TRL's bnpo
    seq-mean-token-sum       sum_i sum_t m w l / B                       verl; LUSPO
    seq-mean-token-mean      sum_i (sum_t m w l / |o_i|) / B             GRPO; TRL's grpo and sapo
    seq-mean-token-sum-norm  seq-mean-token-sum / norm                   Dr. GRPO, norm = largest completion length
    =======================  ==========================================  ==============================================

    ``denominator``, given with each call, replaces N (tokens) or B (sequences): under gradient accumulation the number
    of the whole batch; under data parallelism, where gradients are averaged over ranks, that of all ranks divided by
    their number. Left out, N and B are this call's own. Weights change no denominator.

    Args:
        mode: a name of the table.
        norm: the constant of seq-mean-token-sum-norm.
        count_empty: whether sequences without any token under the mask count in B. TRL counts them, verl does not.
    """

    mode: str = "token-mean"
    norm: float | None = None
    count_empty: bool = False

    def __post_init__(self) -> None:
        check_choice("aggregation", self.mode, tuple(MODES))
        if (self.norm is None) == (self.mode == "seq-mean-token-sum-norm"):
            raise ValueError(f"norm: a constant, for seq-mean-token-sum-norm and no other mode; got {self.norm}")
        if self.norm is not None:
            check_number("norm", self.norm, above=0)

    @property
    def sequences(self) -> bool:
        return MODES[self.mode] == "sequences"

    def weights(self, tokens: Tokens, denominator: float | Tensor | None = None) -> Tensor:
        """[T] the weight of every token's loss, 0 where masked; includes the input "weights"."""
        self.check(denominator)
        weights = tokens.mask.to(tokens.dtype)
        if "weights" in tokens:
            weights = weights * tokens["weights"]
        if self.mode == "token-sum":
            return weights
        if self.mode == "seq-mean-token-mean":
            weights = weights / tokens.segments.spread(tokens.segments.lengths.clamp(min=1).to(weights.dtype))
        if denominator is None:
            denominator = self._own_denominator(tokens)
        return weights / (denominator if self.norm is None else denominator * self.norm)

    def described(self, slots: Slots, denominator: float | Tensor | None = None) -> tuple[dict, Tensor | None]:
        """(what a recipe says of the weights, a denominator that is a tensor)."""
        self.check(denominator)
        found = {"weights": slots("weights")} if "weights" in slots.tokens else {}
        found["sequence_mean"] = self.mode == "seq-mean-token-mean"
        if self.mode == "token-sum":
            return found, None
        scale = 1.0 if self.norm is None else 1 / self.norm
        if isinstance(denominator, Tensor):
            return {**found, "denominator": "given", "scale": scale}, denominator
        if denominator is None and not (self.sequences and self.count_empty):
            return {**found, "denominator": MODES[self.mode], "scale": scale}, None
        return {**found, "scale": scale / (denominator or max(slots.tokens.segments.count, 1))}, None

    def _own_denominator(self, tokens: Tokens) -> Tensor | int:
        if not self.sequences:
            return tokens.mask.sum().clamp(min=1)
        if self.count_empty:
            return max(tokens.segments.count, 1)
        return (tokens.segments.lengths > 0).sum().clamp(min=1)

    def check(self, denominator: object) -> None:
        """Raises ValueError or TypeError where the mode does not take it."""
        if denominator is None:
            if self.mode == "dapo":
                raise ValueError("denominator: aggregation 'dapo' needs the number of tokens of the whole batch")
            return
        if self.mode in ("bnpo", "token-sum"):
            raise ValueError(f"denominator: aggregation {self.mode!r} takes none")
        if not isinstance(denominator, Tensor):
            check_number("denominator", denominator, above=0)
        elif denominator.dim() != 0 or denominator.requires_grad:
            raise ValueError("denominator: a number or a 0-d tensor without gradient")


def aggregation_of(mode: str | Aggregation) -> Aggregation:
    return mode if isinstance(mode, Aggregation) else Aggregation(mode)


def reduce(loss: Tensor, weights: Tensor) -> Tensor:
    """``sum_t weight_t loss_t``, where what has weight 0 contributes 0 even if it is infinite."""
    return torch.where(weights == 0, 0, weights * loss).sum()
