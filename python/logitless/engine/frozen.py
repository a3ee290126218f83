"""The strategy of a frozen head: one D per row, which every channel's gradient is made of without a product."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.engine.inputs import Inputs
from logitless.engine.problem import ABSENT, Problem
from logitless.engine.statistics import Statistics


def mix(problem: Problem) -> list[tuple[float, float]] | None:
    """Per channel (alpha, beta): its gradient is alpha D + beta d_y W_y with D that of the first; None: it is not.

    logprob = target_logit - lse, so one D serves all three. (Not of gathered columns: targets count those.)
    """
    if len(problem.channels) == 1:
        return [(1.0, 0.0)]
    mixes = {"LogProb": (1.0, 0.0), "TargetLogit": (0.0, 1.0), "LogSumExp": (-1.0, 1.0)}
    names = [problem.terms[channel[0][1]].encode()[0] for channel in problem.channels]
    if problem.student.ids != ABSENT or names[0] != "LogProb" or not set(names) <= set(mixes):
        return None
    return [mixes[name] for name in names]


def gradient(inputs: Inputs, s: Statistics, d: Tensor, upstream: Tensor) -> Tensor:
    """sum_k upstream_k (alpha_k D + beta_k d_y W_y) of the hidden states; ``upstream`` [K, rows]."""
    alpha, beta = zip(*mix(inputs.problem), strict=True)
    outside = s["target"] == -torch.inf if any(beta) and inputs.restricted else None
    if outside is not None:  # D is then that of -lse, and what reads the target has no gradient
        needs = [inputs.problem.terms[channel[0][1]].needs_targets for channel in inputs.problem.channels]
        upstream = torch.stack(
            [torch.where(outside, 0, u) if need else u for need, u in zip(needs, upstream, strict=True)]
        )
    out = d * (upstream.new_tensor(alpha) @ upstream).to(inputs.dtype)[:, None]
    if any(beta):
        head = inputs.student
        slope = head.outer.double()
        if head.inner is not None:
            slope = slope * head.inner * (1 - ((s["target"] + s["max"]) / slope) ** 2)
        if outside is not None:
            slope = torch.where(outside, 0, slope)
        targets = inputs.targets.clamp(0, inputs.columns - 1)
        factor = (upstream.new_tensor(beta) @ upstream) * inputs.live_values(slope)
        out += factor.to(inputs.dtype)[:, None] * head.weight[targets].to(inputs.dtype)
    return out
