"""Log-probabilities and other statistics of the student's distribution at every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from logitless.engine import library
from logitless.engine.problem import Problem, Request
from logitless.logits import Logits, check_logits, check_targets
from logitless.ops.kept import IGNORED, Recorded
from logitless.ops.loss import check_execution, resolved
from logitless.support import Keep, KeepIds, check_keep, encode
from logitless.terms import Collision, Entropy, LogProb, LogSumExp, MaxLogit, TargetLogit


@dataclass(frozen=True)
class TokenStats:
    """Of scaled logits, per token [...], float32 (float64 for float64 inputs); 0 where ignored, None if not wanted."""

    logprob: Tensor  # log q_y
    lse: Tensor  # log-normaliser
    target_logit: Tensor  # s_y
    entropy: Tensor | None  # nats
    collision: Tensor | None  # sum q^2
    max_logit: Tensor  # without gradient
    argmax: Tensor  # int64


def logprobs(
    student: Logits,
    targets: Tensor,
    *,
    entropy: bool = False,
    collision: bool = False,
    keep: Keep | None = None,
    ignore_index: int = -100,
    compact: bool | None = None,
    strategy: str = "auto",
    product: str = "auto",
    workspace: int | str = "auto",
) -> TokenStats:
    """Log-probabilities of ``targets`` and statistics of their distributions, differentiable together.

    Args:
        student: logits of [...] tokens.
        targets: [...] integer token ids; those equal to ``ignore_index`` give exact zeros and no gradient.
        entropy: also the entropy of each row, in nats.
        collision: also the collision probability, sum of squared probabilities.
        keep: a filter of the tokens (MinP, TopP, TopK, KeepIds), or a tuple of thresholds applied in order, each to
            what those before it left: all statistics are then of the distribution renormalised over the kept tokens,
            which is what a sampler with that filter drew from. The target's log-probability and logit are -inf where it
            is not kept, with gradient 0. See :mod:`logitless.support`.
        compact, strategy, product, workspace: as in ``Objective.__call__``.

    Returns:
        TokenStats: ``logprob``, ``lse``, ``target_logit``, ``entropy`` and ``collision`` carry gradients.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_logits("student", student)
    check_targets(targets, student)
    check_keep(keep)
    workspace_bytes = check_execution(ignore_index, compact, strategy, product, workspace)
    terms = [LogProb(), LogSumExp(), TargetLogit()]
    terms += [Entropy()] if entropy else []
    terms += [Collision()] if collision else []
    channels = tuple([((1.0, i),) for i in range(len(terms))])
    request = Request()
    recorded = Recorded(student, keep, targets, ignore_index) if isinstance(keep, KeepIds) else None
    if recorded is not None:
        targets, ignore_index = recorded.targets, IGNORED
    problem = Problem(
        student=request.head(student) if recorded is None else recorded.head(request),
        teacher=None,
        terms=(*terms, MaxLogit()),
        channels=channels,
        targets=request.place(targets.reshape(-1)),
        argmax=True,
        keep=encode(keep, student.columns),
        restricted=keep is not None,
        ignore_index=ignore_index,
        compact=compact,
        strategy=strategy,
        product=product,
        workspace=workspace_bytes,
    )
    one_scalar = len(terms) == 3 and recorded is None
    results, values, argmax = library.rows(resolved(problem, one_scalar), request.tensors)
    found = [channel.view(student.shape) for channel in results.unbind(0)]
    argmax = argmax.view(student.shape)
    rest = iter(found[3:])
    return TokenStats(
        logprob=found[0],
        lse=found[1],
        target_logit=found[2],
        entropy=next(rest) if entropy else None,
        collision=next(rest) if collision else None,
        max_logit=values[-1].view(student.shape),
        argmax=argmax if recorded is None else recorded.token(argmax),
    )
