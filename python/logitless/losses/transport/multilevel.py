"""Multi-level optimal transport: sorted probabilities whose order is one for a batch, and transport between tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.engine import scan
from logitless.engine.problem import Request
from logitless.logits import Logits, check_number
from logitless.losses.checks import check_choice, check_count
from logitless.losses.rows import expectation
from logitless.losses.transport.alignment import check_sequences, live_tokens, paired
from logitless.ops.loss import LossResult, check_execution
from logitless.ops.row_function import row_values
from logitless.ops.sinkhorn import PointCost, sinkhorn

STD_FLOOR = 1e-4  # added to a row's standard deviation, as released


def multilevel_ot(
    student: Logits,
    teacher: Logits,
    targets: Tensor | None = None,
    teacher_targets: Tensor | None = None,
    *,
    form: str = "masked",
    k: int = 50,
    temperature: float = 1.0,
    logarithm_weight: float = 0.1,
    sinkhorn_weight: float = 0.1,
    epsilon: float = 0.1,
    iterations: int = 10,
    scale: float = 0.001,
    ignore_index: int = -100,
    workspace: int | str = "auto",
) -> LossResult:
    """Multi-level optimal transport: ``L_AD + 0.1 L_SL + 0.1 L_SD``, for models of different tokenizers.

    Cui et al. 2025, "Multi-level optimal transport for universal cross-tokenizer knowledge distillation on language
    models" (AAAI 2025, arXiv 2412.14528). Logits are divided by their standard deviation over the vocabulary (+ 1e-4).
    Of the distributions of all tokens, q and p, the columns are ordered by their sums over the batch, in one order for
    each side, and the first k are kept: what is in the i-th of the student is compared with what is in the i-th of the
    teacher. With i the columns, t the tokens that both answers have, and s, u any token of either:

        absolute difference    L_AD = mean_t sum_i |q_ti - p_ti|
        sequential logarithm   L_SL = mean_t sum_i -p_ti log q_ti
        Sinkhorn distance      L_SD = mean over sequences of 0.001 <P, C>,  C_su = sum_i |q_si - p_ui|

    P is SinKD's (see :func:`sinkd`), 10 iterations at epsilon 0.1, with a mass of 1 for each of the student's tokens,
    and the same mass in equal shares for the teacher's. All of it, times 1.5, is added to the cross-entropy. A column
    that one side lacks, since its vocabulary is smaller than k, has no part in L_SL.

    form="released" is the value of the released code, which differs from that: answers are padded to the longest of the
    batch with rows of zeros, which take part in L_SL and, as uniform distributions, in the transport; L_SL is the
    cross-entropy ``-softmax(q) . log softmax(p)`` of softmaxes of probabilities with student and teacher exchanged, a
    mean over padded tokens; transport is of softmax(q / 2) and softmax(p / 2) with the teacher's tokens as rows, and
    summed over sequences; L_AD is the mean over sequences of means over tokens. It reads logits *at* the answer's
    positions: targets that are not shifted give the same. (Its f = 2, a greedy choice of columns, is not here.)

    Costs two products of the teacher and five of the student: for the columns, their values, and the gradient.

    Args:
        student: logits of [..., T] tokens.
        teacher: of [..., U] tokens, over any vocabulary. A constant.
        targets: [..., T] integers, only to leave out tokens equal to ``ignore_index``; None: all count.
        teacher_targets: [..., U], alike.
        form: "masked", or "released".
        k: columns that are kept; 50 in the paper.
        temperature: divides both sides' standardised logits.
        logarithm_weight, sinkhorn_weight: of L_SL and L_SD.
        epsilon, iterations, scale: of L_SD.
        ignore_index, workspace: as in ``Objective.__call__``.

    Returns:
        LossResult, 0-d: "absolute_difference", "sequential_logarithm" and "sinkhorn_distance" in ``terms``, without
        their weights; ``metrics``: "tokens", how many both answers have.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_sequences(student, teacher)
    check_choice("form", form, ("masked", "released"))
    check_count("k", k)
    for name, value in (("temperature", temperature), ("epsilon", epsilon)):
        check_number(name, value, above=0)
    for name, value in (
        ("logarithm_weight", logarithm_weight),
        ("sinkhorn_weight", sinkhorn_weight),
        ("scale", scale),
    ):
        check_number(name, value)
    check_count("iterations", iterations)
    workspace_bytes = check_execution(ignore_index, None, "auto", "auto", workspace)
    live = [
        live_tokens("targets", targets, student, ignore_index),
        live_tokens("teacher_targets", teacher_targets, teacher, ignore_index),
    ]
    length = max(1, *(mask.shape[-1] for mask in live))
    q, exists = _columns(student, live[0], length, k, temperature, workspace_bytes)
    with torch.no_grad():
        p, teacher_exists = _columns(teacher, live[1], length, k, temperature, workspace_bytes)
    both = exists & teacher_exists
    transport = {"epsilon": epsilon, "iterations": iterations, "workspace": workspace}
    if form == "masked":
        number = both.sum().clamp(min=1)
        difference = _sum((q - p).abs(), both) / number
        log_q = torch.where(q > 0, q, 1).log()  # columns that one side lacks
        logarithm = torch.where(both, -expectation(p, log_q), 0).sum() / number
        a, b = exists.to(q.dtype), teacher_exists.to(q.dtype)
        b = b * a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True).clamp(min=1)
        cost, masks = PointCost(q, p, "l1"), {"mask_a": exists, "mask_b": teacher_exists}
        matched = both.any(-1)
        costs = torch.where(matched, sinkhorn(cost, a, b, **masks, **transport).transport_cost, 0)
        distance = scale * costs.sum() / matched.sum().clamp(min=1)
    else:
        counts = both.sum(-1)
        of_sequences = torch.where(both, (q - p).abs().sum(-1), 0).sum(-1) / counts.clamp(min=1)
        difference = of_sequences.sum() / max(1, len(counts))
        padded = (exists | teacher_exists).any(0).expand_as(both)
        cross_entropy = -(q.softmax(-1) * p.log_softmax(-1)).sum(-1)
        logarithm = torch.where(padded, cross_entropy, 0).sum() / padded.sum().clamp(min=1)
        ones = torch.ones_like(q[..., 0])
        cost, masks = PointCost((p / 2).softmax(-1), (q / 2).softmax(-1), "l1"), {"mask_a": padded, "mask_b": padded}
        distance = scale * sinkhorn(cost, ones, ones, **masks, **transport).transport_cost.sum()
    terms = {
        "absolute_difference": difference,
        "sequential_logarithm": logarithm,
        "sinkhorn_distance": distance,
    }
    loss = difference + logarithm_weight * logarithm + sinkhorn_weight * distance
    return LossResult(loss, {name: term.detach() for name, term in terms.items()}, {"tokens": both.sum()})


def _columns(logits: Logits, live: Tensor, length: int, k: int, temperature: float, workspace) -> tuple[Tensor, Tensor]:
    """([B, length, k], [B, length] bool): of live tokens, first ones first, the k columns with the largest sums.

    Zeros where there is no token or no such column.
    """
    pairs = paired(live, live)
    index = pairs.indices[0]
    with torch.no_grad():
        total = torch.zeros(logits.columns, dtype=torch.float64, device=logits.device)
        request = Request()
        spec = request.head(logits)
        for at, (s,) in scan.walk([spec], request.tensors, workspace, index):
            for block in scan.blocks(s):
                alive = pairs.live[at][block, None]
                total += torch.where(alive, _standardised(s[block], temperature).exp(), 0).sum(0, dtype=torch.float64)
        ids = total.topk(min(k, logits.columns)).indices
    how = {"width": len(ids), "indices": [index], "workspace": workspace}
    values = row_values(lambda s: _standardised(s, temperature)[:, ids].exp(), [logits], **how)
    exists = torch.arange(length, device=live.device) < pairs.counts[:, None]
    rank = live.cumsum(-1).reshape(-1)[pairs.student] - 1  # of a token among those of its sequence that count
    place = torch.where(pairs.live, pairs.sequence * length + rank, 0)
    values = torch.where(pairs.live[:, None], values, 0)
    found = values.new_zeros((exists.numel(), len(ids))).index_put((place,), values, accumulate=True)
    return F.pad(found, (0, k - len(ids))).view(*exists.shape, k), exists


def _standardised(s: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of logits over their standard deviation, for which logits of -inf do not exist."""
    finite = s > -torch.inf
    number = finite.sum(-1, keepdim=True)
    mean = torch.where(finite, s, 0).sum(-1, keepdim=True) / number.clamp(min=1)
    square = torch.where(finite, s - mean, 0).square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)
    deviation = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
    standardised = torch.where(finite, s, 0) / ((deviation + STD_FLOOR) * temperature)
    return torch.where(finite, standardised, -torch.inf).log_softmax(-1)


def _sum(values: Tensor, live: Tensor) -> Tensor:
    return torch.where(live, values.sum(-1), 0).sum()
