"""The composition that every policy loss is.

    loss = sum_t weight_t * (factor_t * surrogate_t + sum_k coef_k * penalty_k,t)

``factor`` is the product of corrections and selections, ``weight`` the aggregation's; neither has a gradient. So the
gradient on a token's log-probability is weight_t times d value_t / d logprob_t wherever the objective is ``row_local``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitless.logits import check_floating
from logitless.losses.policy.aggregation import Aggregation, aggregation_of
from logitless.losses.policy.corrections import ImportanceCorrection, Opsm, Rejection
from logitless.losses.policy.inputs import STATISTICS, Part, Slots, Tokens, exp, expm1, prepare
from logitless.losses.policy.penalties import Penalty
from logitless.losses.policy.ratios import GeometricRatio, Ratio
from logitless.losses.policy.rewards import LogRatioReward
from logitless.losses.policy.selection import Selection
from logitless.losses.policy.surrogates import Clip, Surrogate
from logitless.ops.loss import LossResult
from logitless.ops.tokens.kernels import run, select
from logitless.ops.tokens.recipe import ABSENT, METRICS, Factor, Recipe
from logitless.tokenwise import Tokenwise

KNOWN = ("old_logprob", "ref_logprob", "teacher_logprob", "base_logprob", "rollout_logprob", "entropy", "advantages")


@dataclass(frozen=True)
class TokenObjective(Tokenwise):
    """A policy loss; ``dataclasses.replace`` changes a part of a preset.

    It is called like a term, and adds with terms: ``objective(student, targets=..., advantages=..., old_logprob=...)``
    and ``(objective + 0.1 * ll.Divergence("reverse_kl"))(student, teacher=..., ...)`` with the inputs of
    :meth:`from_logprobs` by name, one pass where each token's gradient depends on its own numbers alone.

    Args:
        surrogate: what stands for the expected advantage.
        ratio: the log-ratio that it sees.
        penalties: added to it: :class:`KL`, :class:`Entropy`, ...
        rewards: added to the advantages first.
        correction: factors for samples of an inference engine, see :mod:`corrections`.
        selection: which tokens have the surrogate.
        aggregation: an :class:`Aggregation` or the name of its mode.
    """

    surrogate: Surrogate = Clip()
    ratio: Ratio | GeometricRatio = Ratio()
    penalties: tuple[Penalty, ...] = ()
    rewards: tuple[LogRatioReward, ...] = ()
    correction: tuple[ImportanceCorrection | Rejection | Opsm, ...] = ()
    selection: tuple[Selection, ...] = ()
    aggregation: Aggregation = Aggregation()

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", aggregation_of(self.aggregation))
        for name in ("penalties", "rewards", "correction", "selection"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name}: a tuple, got {type(getattr(self, name)).__name__}")
        self.register()

    # ---- what the engine asks

    @property
    def parts(self) -> tuple:
        return (self.ratio, self.surrogate, *self.penalties, *self.rewards, *self.correction, *self.selection)

    @property
    def reads(self) -> frozenset[str]:
        """All tensors that it reads, by name."""
        return frozenset().union(*[part.reads for part in self.parts]) | {"logprob"}

    @property
    def inputs(self) -> frozenset[str]:
        """Of those, the ones that are constant."""
        return self.reads - set(STATISTICS)

    @property
    def statistics(self) -> frozenset[str]:
        """Of those, what is computed from the policy's rows, and gets a gradient: logprob, entropy, lse, ..."""
        return self.reads & set(STATISTICS)

    @property
    def row_local(self) -> bool:
        """Whether a token's value and gradient depend on that token's own numbers alone, once inputs are prepared."""
        return all(part.row_local or part.fixed for part in self.parts)

    @property
    def sequences(self) -> bool:
        """Whether it must know where sequences begin."""
        return self.aggregation.sequences or any(part.sequences for part in self.parts)

    @property
    def names(self) -> list[str]:
        """Keys of ``result.terms``; a name that occurs again gets a number."""
        given = ["policy", *(penalty.name for penalty in self.penalties)]
        earlier = [given[:i].count(name) for i, name in enumerate(given)]
        return [f"{name}_{count + 1}" if count else name for name, count in zip(given, earlier, strict=True)]

    def prepare(self, given: dict[str, Tensor | None], *, like: Tensor, mask=None, cu_seqlens=None) -> Tokens:
        """Inputs checked, flat and masked, with the product of the factors that do not depend on the policy.

        ``given`` need not hold statistics, :meth:`value` takes them; ``like`` has the shape of a token tensor.
        """
        given = {name: x for name, x in given.items() if x is not None}
        if self.sequences and like.dim() == 1 and cu_seqlens is None:
            raise ValueError("cu_seqlens: needed by this objective, whose ratio or mean is per sequence")
        fixed = [part for part in (*self.correction, *self.selection) if part.fixed]
        optional = {"old_logprob"}.difference(*[part.reads for part in fixed])  # those cannot wait for logprob
        optional |= {"advantages"} if self.rewards else set()
        if missing := sorted(self.inputs - given.keys() - optional):
            raise ValueError(f"{missing[0]}: needed by this objective ({', '.join(missing)})")
        if unknown := sorted(given.keys() - self.reads - {*KNOWN, "weights"}):
            raise TypeError(f"{unknown[0]}: not an input of this objective")
        wanted = {name: x for name, x in given.items() if name in self.reads | {"weights", "entropy"}}
        tokens = prepare(wanted, like=like, mask=mask, cu_seqlens=cu_seqlens)
        return replace(tokens, later={"factor": lambda tokens: _product(fixed, tokens)}) if fixed else tokens

    def local(self, values: Mapping[str, Tensor], mask: Tensor) -> Tokens:
        """Tokens of a row-local objective from values that :meth:`prepare` gave, float64."""
        return Tokens.of(values, mask, torch.float64)

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        """[T] each: the surrogate as "policy", with its factor, and every penalty without its coefficient."""
        tokens = self._rewarded(tokens)
        policy = self.surrogate.loss(tokens, self.ratio.log_ratio(tokens))
        if (factor := self._factor(tokens)) is not None:
            policy = torch.where(factor == 0, 0, factor * policy)
        values = [policy, *(penalty.value(tokens) for penalty in self.penalties)]
        return dict(zip(self.names, values, strict=True))

    def value(self, inputs: Tokens, **statistics: Tensor) -> Tensor:
        """[T] the whole loss per token, from prepared inputs and the policy's statistics (``logprob=``, ...), flat.

        If the objective is ``row_local``, inputs and statistics may be any subset of the tokens.
        """
        return self.total(self.losses(inputs.with_values(**statistics)))

    def check_denominator(self, denominator: float | Tensor | None) -> None:
        self.aggregation.check(denominator)

    def weights(self, tokens: Tokens, denominator: float | Tensor | None = None) -> Tensor:
        """[T] weights with ``loss = (weights * value).sum()``, known before the forward pass."""
        return self.aggregation.weights(tokens, denominator)

    @torch.no_grad()
    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """0-d tensors; means are over the tokens that count. See :meth:`from_logprobs`."""
        tokens = self._rewarded(tokens.with_given())
        log_ratio = self.ratio.log_ratio(tokens)
        low, high = [
            of_ratio | of_surrogate
            for of_ratio, of_surrogate in zip(
                self.ratio.clipped(tokens), self.surrogate.clipped(tokens, log_ratio), strict=True
            )
        ]
        ratio, d = exp(log_ratio), tokens.log_ratio
        found = {
            "tokens": tokens.mask.sum(),
            "clip_fraction_low": tokens.mean(low.to(d.dtype)),
            "clip_fraction_high": tokens.mean(high.to(d.dtype)),
            "approx_kl_k1": tokens.mean(-d),
            "approx_kl_k3": tokens.mean(expm1(d) - d),
            "ratio_mean": tokens.mean(ratio),
            "ratio_min": _extreme(tokens, ratio, torch.amin, torch.inf),
            "ratio_max": _extreme(tokens, ratio, torch.amax, -torch.inf),
        }
        if "entropy" in tokens:
            found["entropy"] = tokens.mean(tokens["entropy"])
        if (factor := self._factor(tokens)) is not None:
            found["factor_mean"] = tokens.mean(factor)
            found["kept_fraction"] = tokens.mean((factor != 0).to(factor.dtype))
        return found

    # ---- what a user calls

    def from_logprobs(
        self,
        *,
        logprob: Tensor,
        advantages: Tensor | None = None,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        teacher_logprob: Tensor | None = None,
        base_logprob: Tensor | None = None,
        rollout_logprob: Tensor | None = None,
        entropy: Tensor | None = None,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        denominator: float | Tensor | None = None,
        **inputs: Tensor,
    ) -> LossResult:
        """The loss from log-probabilities of the sampled tokens, packed or padded.

        Args:
            logprob: [T] packed or [B, T] padded, floating: the policy's, with gradient.
            advantages: per token, in the same shape, or per sequence [B], as every input below.
            old_logprob: of the policy that the ratio is to. None: on-policy, ``logprob.detach()``.
            ref_logprob: of the reference of the KL penalty.
            teacher_logprob: of a teacher.
            base_logprob: of a base model (G-OPD).
            rollout_logprob: as the inference engine returned them.
            entropy: of the policy's distributions, with gradient where a penalty has it; otherwise for metrics.
            weights: factors on the losses.
            mask: not 0 where a token counts, in logprob's shape; None: everywhere. What stands elsewhere, NaN included,
                has no influence, and gradient exactly 0.
            cu_seqlens: [B + 1] int, cumulative lengths from 0, for packed tokens; tokens after the last do not count.
            denominator: number or 0-d tensor, see :class:`Aggregation`.
            inputs: others that parts of the objective read, by name (``objective.reads``).

        Returns:
            LossResult: ``loss`` 0-d; ``terms``: "policy" and each penalty, aggregated alike, without coefficient and
            gradient; ``metrics``, 0-d without gradient: tokens, clip_fraction_low and _high, approx_kl_k1 and _k3 (from
            old to new policy, of tokens), ratio_mean, _min and _max (as the surrogate sees it), entropy if given,
            factor_mean and kept_fraction where there are corrections or selections. Float32, float64 for a float64
            logprob. Nothing waits for the device.

            All of it is one kernel (:mod:`logitless.ops.tokens`), whose gradient has no gradient of its own. Parts that
            a user defines, float64 and compiled graphs, which torch.compile fuses itself, are torch operations.

        Raises:
            TypeError, ValueError: naming the argument, before any work.
        """
        check_floating("logprob", logprob)
        given = {
            "logprob": logprob,
            "advantages": advantages,
            "old_logprob": old_logprob,
            "ref_logprob": ref_logprob,
            "teacher_logprob": teacher_logprob,
            "base_logprob": base_logprob,
            "rollout_logprob": rollout_logprob,
            "entropy": entropy,
            "weights": weights,
            **inputs,
        }
        if missing := sorted(name for name in self.statistics if given.get(name) is None):
            raise ValueError(f"{missing[0]}: needed by this objective")
        tokens = self.prepare(given, like=logprob, mask=mask, cu_seqlens=cu_seqlens)
        return self.evaluate(tokens, denominator)

    # ---- pieces

    def evaluate(self, tokens: Tokens, denominator: float | Tensor | None) -> LossResult:
        kernels = select(tokens.device, tokens.dtype)
        described = None if kernels is None else self.recipe(tokens, denominator)
        if described is None:
            return super().evaluate(tokens, denominator)
        recipe, inputs, given = described
        segments, needed = tokens.segments, recipe.needs_offsets or any(x.dim() == 2 for x in inputs)
        offsets = segments.offsets if segments is not None and (needed or not segments.whole) else None
        loss, results = run(kernels, recipe, inputs, tokens.given_mask, offsets, given)
        found = dict(zip(recipe.results, results.to(tokens.dtype).unbind(), strict=True))
        terms = [found["policy"], *(found[f"penalty_{k}"] for k in range(len(self.penalties)))]
        absent = set() if recipe.factors else {"factor_mean", "kept_fraction"}
        absent |= {"entropy"} if recipe.entropy == ABSENT else set()
        metrics = {name: found[name] for name in METRICS if name not in absent}
        metrics["tokens"] = results[recipe.results.index("tokens")].long()
        return LossResult(loss, dict(zip(self.names, terms, strict=True)), metrics)

    def recipe(
        self, tokens: Tokens, denominator: float | Tensor | None
    ) -> tuple[Recipe, list[Tensor], Tensor | None] | None:
        """(recipe, its inputs, a denominator that is a tensor); None where a part has no description.

        What torch computes beforehand, it computes here.
        """
        tokens = tokens.with_given()  # what is made here is not made for the torch expression, which may need gradients
        if self.rewards:
            later = {"advantages": lambda _: self._rewarded(tokens)["advantages"]}
            slots = Slots(replace(tokens, later={**tokens.later, **later}, made={}))
        else:
            slots = Slots(tokens)

        def described(part: Part) -> object | None:
            own = vars(type(part)).get("described")
            return None if own is None else own(part, slots)

        ratio, surrogate = described(self.ratio), described(self.surrogate)
        penalties = tuple(described(part) for part in self.penalties)
        rewards = tuple(described(part) for part in self.rewards)
        if None in (ratio, surrogate, *penalties, *rewards):
            return None
        factors = tuple(
            described(part) or Factor("input", slots.made(part.factor(slots.tokens)))
            for part in (*self.correction, *self.selection)
        )
        others = {penalty.other for penalty in penalties if penalty.other > 0}
        weighting, given = self.aggregation.described(slots, denominator)
        old, advantages, entropy = [
            slots(name) if name == "old_logprob" or name in tokens.given else ABSENT
            for name in ("old_logprob", "advantages", "entropy")
        ]
        inputs = list(slots.inputs.values())
        gradients = (0, *sorted(k for k in others if inputs[k].requires_grad))
        recipe = Recipe(
            inputs=tuple(slots.inputs),
            gradients=gradients,
            old=old,
            advantages=advantages,
            rewards=rewards,
            ratio=ratio,
            surrogate=surrogate,
            penalties=penalties,
            factors=factors,
            entropy=entropy,
            **weighting,
        )
        return (recipe, inputs, given) if recipe.fits else None

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        policy, *values = losses.values()
        return policy + sum(penalty.coef * value for penalty, value in zip(self.penalties, values, strict=True))

    def _rewarded(self, tokens: Tokens) -> Tokens:
        if not self.rewards:
            return tokens
        added = sum(reward.advantages(tokens) for reward in self.rewards)
        return tokens.with_values(advantages=tokens["advantages"] + added if "advantages" in tokens else added)

    def _factor(self, tokens: Tokens) -> Tensor | None:
        factors = [part for part in (*self.correction, *self.selection) if not part.fixed]
        found = [_product(factors, tokens)] if factors else []
        found += [tokens["factor"]] if "factor" in tokens else []
        return torch.stack(found).prod(0) if found else None


def _product(factors: list, tokens: Tokens) -> Tensor:
    return torch.stack([part.factor(tokens) for part in factors]).prod(0)


def _extreme(tokens: Tokens, x: Tensor, of, neutral: float) -> Tensor:
    if not x.numel():
        return x.new_zeros(())
    return torch.where(tokens.mask.any(), of(torch.where(tokens.mask, x, neutral)), 0)
