"""Policy objectives by the Triton kernels of ``logitless.kernels.tokens``: one launch, two where sums over sequences
come first, and one for the gradients. Sizes must stay below 2^31.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from logitless.backends import triton as backend
from logitless.ops.tokens.kernels import Call
from logitless.ops.tokens.recipe import ABSENT, FACTORS, OVER, PENALTIES, Recipe

if backend.PROBLEM is None:
    from logitless.kernels import configs
    from logitless.kernels import tokens as kernels

SPREADING = ("sequence-mean", "sequence-sum", "geometric")  # levels at which a token's ratio is that of its sequence
RESERVED = 1024  # counters for launches that CUDA graphs capture; after these, their graphs set some to 0


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return backend.PROBLEM is None and backend.supports(device, dtype)


# ---- the contract


class State(NamedTuple):
    """``backward`` needs the last three where the ratio's derivative is spread over sequences; else they are None."""

    slopes: Tensor  # [G, T], over norm
    norm: Tensor  # [] float64
    share: Tensor | None  # [T] int8
    spread: Tensor | None  # [parts] float64
    offsets: Tensor | None


def forward(call: Call, wanted: bool) -> tuple[Tensor, State | None]:
    recipe, offsets, lp = call.recipe, call.offsets, call.inputs[0]
    device, tokens = lp.device, lp.numel()
    description = described(recipe)
    gradients = recipe.gradients if wanted else ()
    spread = 0 in gradients and recipe.ratio.level in SPREADING
    by_sequence = offsets is not None and call.needs_offsets
    grid = _parts(tokens, offsets if by_sequence else None, device)
    sizes = _sizes(grid, offsets)
    fields, quantities, sums_first = (
        description.own["FIELDS"],
        description.shared["QUANTITIES"],
        description.own["SUMS"],
    )
    slopes = torch.empty(len(gradients), tokens, dtype=torch.float32, device=device)
    share = torch.empty(tokens, dtype=torch.int8, device=device) if spread else None
    programs = min(grid.programs, grid.parts)
    partials = torch.empty(fields, programs, dtype=torch.float64, device=device)
    sums = torch.empty(quantities + spread, grid.parts, dtype=torch.float64, device=device) if sums_first else partials
    of_ratio = sums[-1] if spread else None
    results = torch.empty(len(recipe.results), dtype=torch.float64, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device) if sums_first else _counter(device)
    shared = [call.inputs, _given(call.mask, lp), _given(offsets, lp), description.numbers, sums]
    options = description.shared | {"PER_SEQUENCE": call.per_sequence, "MASK": call.mask is not None}
    with backend.on(device):
        if sums_first:
            kernels.sequence_sums[(grid.parts,)](*shared, counter, *sizes, **options, **_options(grid))
        kernels.evaluate[(programs,)](
            *shared,
            _given(call.denominator, lp),
            slopes,
            _given(share, lp),
            _given(of_ratio, lp),
            partials,
            counter,
            results,
            *sizes,
            **options,
            **description.own,
            OFFSETS=by_sequence,
            LIMITED=offsets is not None and not by_sequence,
            GRADIENTS=gradients,
            SPREAD=spread,
            **_options(grid),
        )
    state = State(slopes, results[-1], share, of_ratio, offsets if spread else None)
    return results, state if wanted else None


def backward(recipe: Recipe, state: State, upstream: Tensor) -> tuple[Tensor, ...]:
    slopes, norm, share, spread, offsets = state
    grid = _parts(slopes.shape[1], offsets, slopes.device)
    out = torch.empty_like(slopes)
    with backend.on(slopes.device):
        kernels.gradient[(grid.parts,)](
            slopes,
            _given(share, slopes),
            _given(spread, slopes),
            _given(offsets, slopes),
            norm,
            upstream,
            out,
            *_sizes(grid, offsets),
            COUNT=len(slopes),
            SPREAD=offsets is not None,
            **_options(grid),
        )
    return out.unbind()


def _given(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor


def _parts(tokens: int, offsets: Tensor | None, device: torch.device) -> configs.TokenParts:
    sequences = None if offsets is None else offsets.numel() - 1
    return configs.token_parts(tokens, sequences, backend.processors(device.index), backend.interpreted())


def _sizes(grid: configs.TokenParts, offsets: Tensor | None) -> tuple[int, ...]:
    """Tokens, sequences, halvings that find one of them, width, parts."""
    sequences = 0 if offsets is None else offsets.numel() - 1
    return grid.tokens, sequences, sequences.bit_length(), grid.width, grid.parts


def _options(grid: configs.TokenParts) -> dict[str, object]:
    return {"BLOCK": grid.block, "num_warps": grid.warps, "enable_fp_fusion": False}


# ---- what kernels are told


class _Description(NamedTuple):
    shared: dict[str, object]  # constants of both kernels
    own: dict[str, object]  # of ``evaluate`` alone
    numbers: tuple[float, ...]


@functools.lru_cache
def described(recipe: Recipe) -> _Description:
    ratio, surrogate = recipe.ratio, recipe.surrogate
    total, maximum, count = (kind.value for kind in (kernels.TOTAL, kernels.MAXIMUM, kernels.COUNT))
    sum_kinds = [count]
    sum_kinds += [total] if ratio.level != "token" else []
    sum_kinds += [total] if surrogate.name == "vespo" else []
    factors: tuple[int, ...] = ()
    for factor in recipe.factors:
        over = "mean" if factor.name == "opsm" else factor.over
        named = (FACTORS.index(factor.name), factor.first, factor.rollout, OVER.index(over))
        factors += (*named, int(factor.masked), 0 if over == "token" else len(sum_kinds))
        sum_kinds += [] if over == "token" else [maximum if over == "max" else total]
    shared = {
        "OLD": recipe.old,
        "ADVANTAGES": recipe.advantages,
        "REWARDS": tuple(slot for reward in recipe.rewards for slot in (reward.plus, reward.minus)),
        "LEVEL": ratio.level,
        "TEACHER": ratio.teacher,
        "LOG_W": surrogate.name == "vespo",
        "ROLLOUT": surrogate.rollout,
        "FACTORS": factors,
        "SUM_KINDS": tuple(sum_kinds),
        "SUM_PLACES": tuple(range(len(sum_kinds))),
        "QUANTITIES": max(2, configs.power_of_two(len(sum_kinds))),
    }

    parameters = surrogate.parameters
    if surrogate.name == "clip":
        parameters = (1 - parameters[0], 1 + parameters[1], *parameters[2:])
    penalties: tuple[int, ...] = ()
    for penalty in recipe.penalties:
        finite = math.isfinite(penalty.largest) + 2 * math.isfinite(penalty.largest_value)
        named = (PENALTIES.index(penalty.name), penalty.other, penalty.weights, penalty.keep)
        penalties += (*named, finite)
    kinds = {name: total for name in recipe.results[1:-1]}
    kinds |= dict.fromkeys(("tokens", "clip_fraction_low", "clip_fraction_high", "kept_fraction"), count)
    kinds |= dict.fromkeys(("ratio_min", "ratio_max"), maximum)
    absent = {"entropy"} if recipe.entropy == ABSENT else set()
    absent |= set() if recipe.factors else {"factor_mean", "kept_fraction"}
    places = {name: place for place, name in enumerate(kinds) if name not in absent}
    own = {
        "BOUNDED": ratio.level != "geometric" and (math.isfinite(ratio.low) or math.isfinite(ratio.high)),
        "SURROGATE": surrogate.name,
        "GIVEN": tuple(math.isfinite(x) for x in parameters),
        "PENALTIES": penalties,
        "WEIGHTS": recipe.weights,
        "ENTROPY": recipe.entropy,
        "SEQUENCE_MEAN": recipe.sequence_mean,
        "DENOMINATOR": recipe.denominator,
        "KINDS": tuple(kinds[name] for name in places),
        "PLACES": tuple(places.values()),
        "FIELDS": configs.power_of_two(len(kinds) + 1),
        "SUMS": recipe.needs_offsets,
    }

    numbers = (recipe.scale, 1 - ratio.share, ratio.share, ratio.low, ratio.high)
    numbers += (*parameters, *(4 - len(parameters)) * (0.0,))
    numbers += tuple(reward.coef for reward in recipe.rewards)
    for penalty in recipe.penalties:
        numbers += (penalty.coef, penalty.largest, penalty.largest_value, penalty.alpha, 1 - penalty.alpha)
    for factor in recipe.factors:
        numbers += (factor.low, factor.high, factor.bound)
    return _Description(shared, own, tuple(map(float, numbers)))


# ---- the counter of finished programs


_reserve: dict[torch.device, Iterator[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """int32 0, which no launch that may run at the same time has.

    Launches on one stream follow each other and share one. A captured launch has its own, as graphs may run on any
    stream; memory of the graph would have to be set to 0 in every replay.
    """
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        own = next(_reserve.get(device, iter(())), None)
        return torch.zeros(1, dtype=torch.int32, device=device) if own is None else own
    if device not in _reserve:
        _reserve[device] = iter(torch.zeros(RESERVED, 4, dtype=torch.int32, device=device))  # rows: aligned
    stream = device, torch.cuda.current_stream(device).cuda_stream
    if stream not in _of_stream:
        _of_stream[stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _of_stream[stream]
