"""What results per token keep for their backward pass: O(N) statistics in one float64 tensor [S, N]."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.engine.groups import grouped, key
from logitless.engine.problem import ABSENT, Problem
from logitless.engine.statistics import Statistics


def statistic_names(problem: Problem, tensors: list[Tensor]) -> dict:
    """Keys of the statistics that are kept, in their order: how many per row."""
    names: dict = {}
    for g, group in enumerate(grouped(problem.terms)):
        of_group: list = ["max", "log_sum"]
        of_group += ["target"] if problem.targets != ABSENT else []
        of_group += ["entropy"] if "entropy" in group.wanted else []
        of_group += ["log_collision"] if "collision" in group.wanted else []
        of_group += ["weighted", "mass"] if "weighted" in group.wanted else []
        if problem.teacher is not None:
            of_group += ["teacher_max", "teacher_log_sum"]
            of_group += ["forward_kl", "reverse_kl"] if "moments" in group.wanted else []
            of_group += [(name, part) for name in group.generic for part in ("value", "slope")]
            if any(problem.teacher.wants_grad):
                of_group += [("teacher", name, part) for name in group.adjoint_generic for part in ("value", "slope")]
        names |= {key(g, name): 1 for name in of_group}
        if group.picked:
            ids = next(term.topk[0] for term in problem.terms if term.topk is not None)
            names[key(g, "topk")] = tensors[ids].shape[1]
        if group.rest:
            names[key(g, "topk_rest")] = 1
    return names | ({"floor": 1} if problem.keep else {})


def pack(s: Statistics, names: dict, rows: int, tokens: int) -> Tensor:
    """The statistics of the rows, zeros behind them up to N: a compiled graph must know the shape."""
    kept = next(iter(s.values())).new_zeros(sum(names.values()), tokens, dtype=torch.float64)
    kept[:, :rows] = torch.cat([s[name].reshape(rows, width).t() for name, width in names.items()])
    return kept


def unpack(kept: Tensor, names: dict, rows: int) -> Statistics:
    """Undoes :func:`pack`."""
    parts = kept[:, :rows].split(list(names.values()))
    return {
        name: part.t() if name in ("topk", ("group", name[1], "topk")) else part[0]
        for name, part in zip(names, parts, strict=True)
    }
