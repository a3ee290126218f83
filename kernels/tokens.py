"""Policy objectives of tokens: one reading of their inputs gives value, derivatives and metrics.

    x[k] [T] per token or [B] per sequence -> results [F] float64, slopes [G, T] float32 -> gradients [G, T]

``logitless/ops/tokens/recipe.py`` has the formulas and names; what is computed is chosen at compile time, coefficients
and bounds are arguments. 4 bytes per token are read for each input (1 for the mask) and written for each slope: ppo
with a reference moves 21 MB for 1M tokens, its gradient 8 MB; some 110 instructions per token are half of that time.

Tokens come in parts: without sequences every ``width`` tokens are one; else one begins where a sequence or a multiple
of ``width`` does, so that a long sequence is the work of many programs. With ``first_i = i + offsets_i // width``,
sequence i has the parts ``first_i : first_{i+1}``, and its part p lies in tile ``p - i``. What follows the last
sequence is one more. Where sums over sequences are needed :func:`sequence_sums` makes them by part, and
:func:`evaluate` joins those of its sequence; the derivative by a ratio of the whole sequence runs back the same way, by
:func:`gradient`.

The last program of ``evaluate`` to finish adds up the results of all, in their order: same inputs, same bits. A ticket
finds it. A program's results are stored, then come a barrier of its threads and an atomic addition that releases and
acquires at the GPU's scope, then a barrier again: what was stored before any ticket is visible to who drew the last
one, and is loaded past the first-level cache. The counter is left at 0, for the next launch or graph replay.
"""

import triton
import triton.language as tl

from logitless.kernels import elementary
from logitless.kernels.elementary import log1p, times

# Places in PENALTIES, FACTORS and OVER of recipe.py: Triton takes no names in its tuples. 0: k1, input, token.
ABS, K2, K3, K1_PLUS, K3_PLUS, RAPO = (tl.constexpr(k) for k in range(1, 7))
DPH_FORWARD_KL, DPH_JS, DPH_ALPHA, RATIO_K3, INPUT, NLL = (tl.constexpr(k) for k in range(7, 13))
ONLY, NOT, AT_LEAST, IMPORTANCE = (tl.constexpr(k) for k in range(1, 5))
REJECTION_K1, REJECTION_K2, REJECTION_K3, OPSM = (tl.constexpr(k) for k in range(5, 9))
MEAN, MAX = tl.constexpr(2), tl.constexpr(3)

# Columns of the flat tuples that describe rewards, penalties and factors, and of ``numbers``.
REWARD = tl.constexpr(2)  # plus, minus
PENALTY = tl.constexpr(5)  # name, other, weights, keep, which of largest (1) and largest_value (2) are finite
FACTOR = tl.constexpr(6)  # name, first, rollout, over, masked, which statistic of the sequence it takes
PENALTY_NUMBERS = tl.constexpr(5)  # coef, largest, largest_value, alpha, 1 - alpha
FACTOR_NUMBERS = tl.constexpr(3)  # low, high, bound
AT_SURROGATE = tl.constexpr(5)  # after scale, 1 - share, share, and low and high of the ratio
AT_REWARDS = tl.constexpr(9)

# How lanes of something are joined: ``KINDS`` has one for each.
TOTAL, MAXIMUM, COUNT = (tl.constexpr(k) for k in range(3))
METRICS = tl.constexpr(11)
RATIO_MIN, RATIO_MAX = tl.constexpr(6), tl.constexpr(7)  # their places among them

LARGEST_LOG = tl.constexpr(80.0)
LEAST_LOG = tl.constexpr(-18.420680743952367)  # log 1e-8
TINY = tl.constexpr(1.1754943508222875e-38)
LANES = tl.constexpr(64)
COUNTS = ("sequences", "steps", "parts")  # arguments whose value is not worth another compilation


# ---- parts


@triton.jit
def _part(p, offsets, tokens, sequences, steps, width, OFFSETS: tl.constexpr):
    """(sequence, first token, end, first part of the sequence, end of its parts) of part p.

    The last sequence whose first part is not after p, found in ``steps`` halvings; what is read outside is none of it,
    whatever the offsets are.
    """
    if OFFSETS:
        low = p * 0
        high = low + sequences
        for _ in range(steps):
            middle = (low + high + 1) // 2
            begun = tl.load(offsets + middle) < (p - middle + 1) * width  # middle + offset // width <= p
            low = tl.where(begun, middle, low)
            high = tl.where(begun, high, middle - 1)
        begin = tl.load(offsets + low).to(tl.int32)
        end = tl.load(offsets + low + 1, mask=low < sequences, other=0).to(tl.int32)
        end = tl.where(low < sequences, end, tokens)
        tile = tl.maximum(p - low, 0) * width
        from_token = tl.maximum(begin, tile)
        to_token = tl.minimum(tl.minimum(end, tile + width), tokens)
        return low, from_token, to_token, low + begin // width, low + 1 + end // width
    else:
        return p * 0, p * width, tl.minimum(p * width + width, tokens), p, p + 1


@triton.jit
def _read(inputs, mask, at, end, live_end, sequence, sequences, PER_SEQUENCE: tl.constexpr, MASK: tl.constexpr):
    """(which tokens count [BLOCK], inputs [BLOCK] each, 0 where they do not); none from ``live_end`` on does."""
    inside = at < end
    counts = inside & (at < live_end)
    if MASK:
        counts = counts & tl.load(mask + at, mask=inside, other=0).to(tl.int1)
    x = ()
    for k in tl.static_range(len(PER_SEQUENCE)):
        if PER_SEQUENCE[k]:
            given = tl.load(inputs[k] + tl.minimum(sequence, sequences - 1))
        else:
            given = tl.load(inputs[k] + at, mask=inside, other=0.0)
        x = x + (tl.where(counts, given, 0.0),)
    return counts, x


# ---- elements of the formulas: values, and derivatives beside them


@triton.jit
def _at_most(x, high):
    """NaN stays, here and in the next two."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, low, high):
    return _at_most(_at_least(x, low), high)


@triton.jit
def _exp(x):
    """(e^min(x, 80), its derivative)."""
    e = elementary.exp(_at_most(x, LARGEST_LOG))
    return e, tl.where(x > LARGEST_LOG, 0.0, e)


@triton.jit
def _expm1(x):
    return elementary.expm1(_at_most(x, LARGEST_LOG))


@triton.jit
def _within(x, low, high):
    return (x >= low) & (x <= high)


@triton.jit
def _advantages(x, numbers, ADVANTAGES: tl.constexpr, REWARDS: tl.constexpr):
    if ADVANTAGES >= 0:
        advantages = x[ADVANTAGES]
    else:
        advantages = tl.zeros_like(x[0])
    for k in tl.static_range(len(REWARDS) // REWARD):
        advantages += numbers[AT_REWARDS + k] * (x[REWARDS[REWARD * k]] - x[REWARDS[REWARD * k + 1]])
    return advantages


@triton.jit
def _log_ratio(x, numbers, OLD: tl.constexpr, TEACHER: tl.constexpr):
    """r, per token."""
    if TEACHER >= 0:
        return x[0] - (numbers[1] * x[OLD] + numbers[2] * x[TEACHER])
    else:
        return x[0] - x[OLD]


@triton.jit
def _geometric(d, advantages, numbers):
    """(c, whether d passes through it)."""
    up, down = advantages > 0, advantages < 0
    cut = (up & (d > numbers[4])) | (down & (d < -numbers[3]))
    c = tl.where(cut, tl.where(up, numbers[4], -numbers[3]), d)
    return tl.where(up | down, c, 0.0), (up | down) & (cut == 0)


@triton.jit
def _log_w(x, OLD: tl.constexpr, ROLLOUT: tl.constexpr):
    """A token's part of vespo's log w."""
    log_w = _clamp(x[0] - x[OLD], -20.0, 20.0)
    if ROLLOUT >= 0:
        log_w += _clamp(x[OLD] - x[ROLLOUT], LEAST_LOG, 20.0)
    return log_w


@triton.jit
def _estimate(x, FACTORS: tl.constexpr, K: tl.constexpr):
    """What factor k holds against its bounds, per token: of u = x[first] - x[rollout]."""
    u = x[FACTORS[FACTOR * K + 1]] - x[FACTORS[FACTOR * K + 2]]
    if FACTORS[FACTOR * K] == IMPORTANCE:
        return u
    elif FACTORS[FACTOR * K] == REJECTION_K2:
        return 0.5 * (u * u)
    elif FACTORS[FACTOR * K] == REJECTION_K3:
        return _expm1(u) - u
    else:
        return -u


@triton.jit
def _factor(x, advantages, of_sequence, numbers, FACTORS: tl.constexpr, K: tl.constexpr, AT: tl.constexpr):
    low, high, bound = numbers[AT], numbers[AT + 1], numbers[AT + 2]
    first = x[FACTORS[FACTOR * K + 1]]
    if FACTORS[FACTOR * K] == ONLY:
        return tl.where(first != 0, 1.0, 0.0)
    elif FACTORS[FACTOR * K] == NOT:
        return tl.where(first == 0, 1.0, 0.0)
    elif FACTORS[FACTOR * K] == AT_LEAST:
        return tl.where(first >= low, 1.0, 0.0)
    elif FACTORS[FACTOR * K] >= IMPORTANCE:
        if FACTORS[FACTOR * K + 5] > 0:
            v = of_sequence[FACTORS[FACTOR * K + 5]]
            if FACTORS[FACTOR * K + 3] == MEAN:
                v = v / of_sequence[0]
            v = v.to(tl.float32) + tl.zeros_like(first)
        else:
            v = _estimate(x, FACTORS, K)
        if FACTORS[FACTOR * K] == IMPORTANCE:
            weight = elementary.exp(_clamp(v, -bound, bound))
            if FACTORS[FACTOR * K + 4]:
                return tl.where(_within(weight, low, high), weight, 0.0)
            else:
                return _clamp(weight, low, high)
        elif FACTORS[FACTOR * K] == OPSM:
            return tl.where((advantages >= 0) | (v <= high), 1.0, 0.0)
        else:
            return tl.where(_within(v, low, high), 1.0, 0.0)
    else:
        return first


@triton.jit
def _surrogate(
    x, advantages, log_w, ratio, slope, numbers, SURROGATE: tl.constexpr, GIVEN: tl.constexpr, OLD: tl.constexpr
):
    """(value, derivative by the log-ratio, derivative by lp beside it, clipped low, clipped high).

    ``ratio`` is e^l, ``slope`` its derivative; parameters, of which GIVEN are finite, are those of the surrogate.
    """
    lp, zero = x[0], tl.zeros_like(x[0])
    never = zero > 0
    a, b, c, d = numbers[AT_SURROGATE], numbers[AT_SURROGATE + 1], numbers[AT_SURROGATE + 2], numbers[AT_SURROGATE + 3]
    if SURROGATE == "clip":  # a, b: 1 - low and 1 + high; c: dual; d: delta, above b
        # A > 0: -A min(rho, b); A < 0: -A min(max(rho, a), c, d), where c alone halves the derivative at its bound
        up, down = advantages > 0, advantages < 0
        bounded = _at_least(ratio, a)
        too_high = zero > 0
        if GIVEN[2]:
            bounded, too_high = _at_most(bounded, c), ratio > c
        if GIVEN[3]:
            bounded, too_high = _at_most(bounded, d), too_high | (ratio > d)
        low, high = down & (ratio < a), (up & (ratio > b)) | (down & too_high)
        slope = tl.where(low | high, 0.0, slope)
        if GIVEN[2]:
            slope = tl.where(down & (ratio == c), 0.5 * slope, slope)
        return -advantages * tl.where(up, _at_most(ratio, b), bounded), -advantages * slope, zero, low, high
    elif SURROGATE == "importance":
        return -advantages * ratio, -advantages * slope, zero, never, never
    elif SURROGATE == "reinforce":
        return -advantages * lp, zero, -advantages, never, never
    elif SURROGATE == "cispo":  # a, b: bounds of the ratio
        weighted = -_clamp(ratio, a, b) * advantages
        return weighted * lp, zero, weighted, ratio < a, ratio > b
    elif SURROGATE == "sapo":  # a, b: tau where A > 0, and else
        tau = tl.where(advantages > 0, a, b)
        y = tau * (ratio - 1.0)
        u = elementary.exp(-tl.abs(y))
        gate = tl.where(y < 0, u, 1.0) / (1.0 + u)
        fade = 4.0 * u / ((1.0 + u) * (1.0 + u))
        return -gate * (4.0 / tau) * advantages, -fade * slope * advantages, zero, never, never
    elif SURROGATE == "vespo":  # a, b: k and lam where A >= 0; c, d: else
        k, lam = tl.where(advantages >= 0, a, c), tl.where(advantages >= 0, b, d)
        w, _ = _exp(log_w)
        phi, _ = _exp(lam + k * log_w - lam * w)
        weighted = -phi * advantages
        return weighted * lp, zero, weighted, never, never
    elif SURROGATE == "dro":  # a: beta
        gap = lp - x[OLD]
        return -(advantages * lp - 0.5 * a * (gap * gap)), zero, a * gap - advantages, never, never
    else:  # dppo; a, b: low and high; c: the cap
        p, p_old, up = elementary.exp(lp), elementary.exp(x[OLD]), advantages > 0
        if SURROGATE == "dppo_tv" or SURROGATE == "dppo_tv_ratio":
            low, high = (up == 0) & (p - p_old < -a), up & (p - p_old > b)
        else:
            rest, rest_old = _log_rest(lp), _log_rest(x[OLD])
            divergence = p_old * (x[OLD] - lp) + (1.0 - p_old) * (rest_old - rest)
            low, high = (up == 0) & (divergence > a) & (p < p_old), up & (divergence > b) & (p > p_old)
        kept = tl.where(low | high, 0.0, advantages)
        if SURROGATE == "dppo_tv_ratio" or SURROGATE == "dppo_kl_ratio":
            return -kept * ratio, -kept * slope, zero, low, high
        else:
            weighted = -kept * _at_most(ratio, c)
            return weighted * lp, zero, weighted, low, high


@triton.jit
def _log_rest(lp):
    """log(1 - e^lp), finite for a probability of 1."""
    rest = -elementary.expm1(lp)
    return tl.log(_at_least(rest, TINY))


@triton.jit
def _k3(d):
    """(e^-d - 1 + d, its derivative)."""
    e = _expm1(-d)
    return e + d, tl.where(-d > LARGEST_LOG, 1.0, -e)


@triton.jit
def _divergence(d, alpha, rest, NAME: tl.constexpr):
    """(value, derivative) of a penalty that is a function of d; ``rest`` is 1 - alpha."""
    if NAME == ABS:
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    elif NAME == K2:
        return 0.5 * (d * d), d
    elif NAME == K3 or NAME == RATIO_K3:
        return _k3(d)
    elif NAME == K1_PLUS:
        return d, d
    elif NAME == K3_PLUS:
        value, _ = _k3(d)
        return value, d
    elif NAME == RAPO:
        w, _ = _exp(-d)
        return -d * w - _expm1(-d), tl.where(-d > LARGEST_LOG, -w, d * w)
    elif NAME == DPH_FORWARD_KL:
        e = _expm1(d)
        return e - d, tl.where(d > LARGEST_LOG, -1.0, e)
    elif NAME == DPH_JS:
        u, _ = _exp(d)
        log_mean = log1p(0.5 * _expm1(d))
        return u * (d - log_mean) - log_mean, tl.where(d > LARGEST_LOG, u, u * (d - log_mean))
    elif NAME == DPH_ALPHA:
        whole, power = _expm1(d), _expm1(rest * d)
        rises, power_rises = d <= LARGEST_LOG, rest * d <= LARGEST_LOG
        difference = tl.where(rises, whole, 0.0) - tl.where(power_rises, power, 0.0)
        difference += tl.where(rises, 1.0, 0.0) - tl.where(power_rises, 1.0, 0.0)
        return tl.fma(whole, -rest, power) * (-1.0 / (alpha * rest)), difference / alpha
    elif NAME == NLL:
        return -d, tl.full(d.shape, -1.0, tl.float32)
    else:  # k1, input
        return d, tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def _penalty(x, numbers, PENALTIES: tl.constexpr, K: tl.constexpr, AT: tl.constexpr, OLD: tl.constexpr):
    """(value, derivatives by lp, by x[other], by x[weights]) of penalty k."""
    largest, largest_value = numbers[AT + 1], numbers[AT + 2]
    if PENALTIES[PENALTY * K] == INPUT:
        d = x[PENALTIES[PENALTY * K + 1]]
    elif PENALTIES[PENALTY * K] == NLL:
        d = x[0]
    else:
        d = x[0] - x[PENALTIES[PENALTY * K + 1]]
    passes = d == d
    if PENALTIES[PENALTY * K + 3] >= 0:
        passes = x[PENALTIES[PENALTY * K + 3]] != 0
        d = tl.where(passes, d, 0.0)
    if PENALTIES[PENALTY * K + 4] & 1:
        passes = passes & _within(d, -largest, largest)
        d = _clamp(d, -largest, largest)
    value, slope = _divergence(d, numbers[AT + 3], numbers[AT + 4], PENALTIES[PENALTY * K])
    slope = tl.where(passes, slope, 0.0)
    beside = tl.zeros_like(value)
    if PENALTIES[PENALTY * K] == RATIO_K3:
        ratio, ratio_slope = _exp(x[0] - x[OLD])
        slope, beside, value = ratio * slope, ratio_slope * value, ratio * value
    if PENALTIES[PENALTY * K + 4] & 2:
        passes = _within(value, -largest_value, largest_value)
        slope, beside = tl.where(passes, slope, 0.0), tl.where(passes, beside, 0.0)
        value = _clamp(value, -largest_value, largest_value)
    unweighted = value
    if PENALTIES[PENALTY * K + 2] >= 0:
        weights = x[PENALTIES[PENALTY * K + 2]]
        value, slope, beside = weights * value, weights * slope, weights * beside
    if PENALTIES[PENALTY * K] == INPUT:
        return value, tl.zeros_like(slope), slope, unweighted
    else:
        return value, slope + beside, -slope, unweighted


# ---- what is added up: lanes of a program, then fields [FIELDS] of a part, then of all


@triton.jit
def _lanes(KINDS: tl.constexpr, BLOCK: tl.constexpr):
    lanes = ()
    for k in tl.static_range(len(KINDS)):
        if KINDS[k] == COUNT:
            lanes = lanes + (tl.zeros([BLOCK], tl.int32),)
        elif KINDS[k] == MAXIMUM:
            lanes = lanes + (tl.full([BLOCK], float("-inf"), tl.float32),)
        else:
            lanes = lanes + (tl.zeros([BLOCK], tl.float32),)
    return lanes


@triton.jit
def _added(lanes, new, KINDS: tl.constexpr):
    added = ()
    for k in tl.static_range(len(KINDS)):
        if KINDS[k] == MAXIMUM:
            added = added + (tl.maximum(lanes[k], new[k]),)
        elif KINDS[k] == COUNT:
            added = added + (lanes[k] + new[k].to(tl.int32),)
        else:
            added = added + (lanes[k] + new[k],)
    return added


@triton.jit
def _fields(lanes, field, KINDS: tl.constexpr, PLACES: tl.constexpr, FIELDS: tl.constexpr):
    row = tl.zeros([FIELDS], tl.float64)
    for k in tl.static_range(len(KINDS)):
        if KINDS[k] == MAXIMUM:
            found = tl.max(lanes[k], 0)
        elif KINDS[k] == COUNT:
            found = tl.sum(lanes[k], 0)
        else:
            found = tl.sum(lanes[k].to(tl.float64), 0)
        row = tl.where(field == PLACES[k], found.to(tl.float64), row)
    return row


@triton.jit
def _maxima(field, KINDS: tl.constexpr, PLACES: tl.constexpr):
    """Which fields are maxima."""
    found = field < 0
    for k in tl.static_range(len(KINDS)):
        if KINDS[k] == MAXIMUM:
            found = found | (field == PLACES[k])
    return found


@triton.jit
def _join(rows, field, maxima, first, end, stride):
    """[FIELDS] the sums, or maxima, over parts first : end of rows [FIELDS, stride], in their order."""
    lane = tl.arange(0, LANES)
    neutral = tl.where(maxima, float("-inf"), 0.0).to(tl.float64)[:, None]
    lanes = neutral + tl.zeros([1, LANES], tl.float64)
    for start in range(first, end, LANES):
        p = start + lane
        inside = (p < end)[None, :]
        found = tl.load(rows + field[:, None] * stride + p[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        found = tl.where(inside, found, neutral)
        lanes = tl.where(maxima[:, None], tl.maximum(lanes, found), lanes + found)
    return tl.where(maxima, tl.max(lanes, 1), tl.sum(lanes, 1))


@triton.jit
def _pick(row, field, at):
    return tl.sum(tl.where(field == at, row, 0.0), 0)


# ---- kernels


@triton.jit(do_not_specialize=COUNTS)
def sequence_sums(
    inputs,  # tuple of float32 [T] or, where PER_SEQUENCE, [B]
    mask,  # [T] bool, or anything without MASK
    offsets,  # [B + 1] int64
    numbers,  # tuple of float: what the columns above say
    sums,  # [QUANTITIES, parts] float64: tokens that count, of the ratio, of log w, of factors: where asked for
    counter,  # [1] int32, of ``evaluate``: set to 0
    tokens, sequences, steps, width, parts,
    PER_SEQUENCE: tl.constexpr, MASK: tl.constexpr,
    OLD: tl.constexpr, ADVANTAGES: tl.constexpr, REWARDS: tl.constexpr, LEVEL: tl.constexpr, TEACHER: tl.constexpr,
    LOG_W: tl.constexpr, ROLLOUT: tl.constexpr, FACTORS: tl.constexpr,
    SUM_KINDS: tl.constexpr, SUM_PLACES: tl.constexpr, QUANTITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    if p == 0:
        tl.store(counter, 0)
    sequence, begin, end, _, _ = _part(p, offsets, tokens, sequences, steps, width, True)
    end = tl.where(sequence < sequences, end, begin)
    lanes = _lanes(SUM_KINDS, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts, x = _read(inputs, mask, at, end, end, sequence, sequences, PER_SEQUENCE, MASK)
        new = (counts,)
        if LEVEL == "geometric":
            c, _ = _geometric(x[0] - x[OLD], _advantages(x, numbers, ADVANTAGES, REWARDS), numbers)
            new = new + (c,)
        elif LEVEL != "token":
            new = new + (_log_ratio(x, numbers, OLD, TEACHER),)
        if LOG_W:
            new = new + (_log_w(x, OLD, ROLLOUT),)
        for k in tl.static_range(len(FACTORS) // FACTOR):
            if FACTORS[FACTOR * k + 5] > 0:
                if FACTORS[FACTOR * k + 3] == MAX:
                    new = new + (tl.where(counts, _estimate(x, FACTORS, k), float("-inf")),)
                else:
                    new = new + (_estimate(x, FACTORS, k),)  # 0 of zeros
        lanes = _added(lanes, new, SUM_KINDS)
    quantity = tl.arange(0, QUANTITIES)
    tl.store(sums + quantity * parts + p, _fields(lanes, quantity, SUM_KINDS, SUM_PLACES, QUANTITIES))


@triton.jit(do_not_specialize=COUNTS)
def evaluate(
    inputs, mask, offsets, numbers, sums,  # as ``sequence_sums`` has them; sums: anything without SUMS
    denominator,  # [] float32, where DENOMINATOR is "given"
    slopes,  # [G, T]: derivatives over norm, of ``GRADIENTS``; without what SPREAD leaves to ``gradient``
    share,  # [T] int8, with SPREAD: whether a token takes part in its sequence's ratio
    spread,  # [parts] float64, with SPREAD: the derivative by the part's ratio, over norm, for each token that does
    partials,  # [FIELDS, programs] float64: policy, penalties, metrics (of ratio_min: of minus the ratio), sequences
    counter,  # [1] int32, 0 before and after
    results,  # [number of results] float64
    tokens, sequences, steps, width, parts,
    PER_SEQUENCE: tl.constexpr, MASK: tl.constexpr,
    OLD: tl.constexpr, ADVANTAGES: tl.constexpr, REWARDS: tl.constexpr, LEVEL: tl.constexpr, TEACHER: tl.constexpr,
    LOG_W: tl.constexpr, ROLLOUT: tl.constexpr, FACTORS: tl.constexpr,
    SUM_KINDS: tl.constexpr, SUM_PLACES: tl.constexpr, QUANTITIES: tl.constexpr,
    BOUNDED: tl.constexpr, SURROGATE: tl.constexpr, GIVEN: tl.constexpr, PENALTIES: tl.constexpr,
    WEIGHTS: tl.constexpr, ENTROPY: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, DENOMINATOR: tl.constexpr,
    KINDS: tl.constexpr, PLACES: tl.constexpr, FIELDS: tl.constexpr,
    OFFSETS: tl.constexpr, LIMITED: tl.constexpr,  # where sequences begin matters; only where the last ends does
    SUMS: tl.constexpr, GRADIENTS: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    AT_PENALTIES: tl.constexpr = AT_REWARDS + len(REWARDS) // REWARD
    PENALTY_COUNT: tl.constexpr = len(PENALTIES) // PENALTY
    AT_FACTORS: tl.constexpr = AT_PENALTIES + PENALTY_NUMBERS * PENALTY_COUNT
    AT_METRICS: tl.constexpr = 1 + PENALTY_COUNT
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = _lanes(KINDS, BLOCK)
    alive = 0.0 * tl.num_programs(0).to(tl.float64)
    for p in range(program, parts, programs):
        sequence, begin, end, first_part, end_part = _part(p, offsets, tokens, sequences, steps, width, OFFSETS)
        stop, live_end = tokens, tokens
        if OFFSETS:
            stop, live_end = end, tl.where(sequence < sequences, end, begin)
        elif LIMITED:
            live_end = tl.load(offsets + sequences).to(tl.int32)

        # statistics of the sequence
        of_sequence = ()
        if SUMS:
            quantity = tl.arange(0, QUANTITIES)
            end_part = tl.where(sequence < sequences, tl.minimum(end_part, parts), 0)
            joined = _join(
                sums, quantity, _maxima(quantity, SUM_KINDS, SUM_PLACES), tl.maximum(first_part, 0), end_part, parts
            )
            alive += tl.where(p == first_part, tl.minimum(_pick(joined, quantity, 0), 1.0), 0.0)
            of_sequence = of_sequence + (tl.maximum(_pick(joined, quantity, 0), 1.0),)
            for k in tl.static_range(1, len(SUM_KINDS)):
                of_sequence = of_sequence + (_pick(joined, quantity, k),)

        ratio_slopes = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            counts, x = _read(inputs, mask, at, stop, live_end, sequence, sequences, PER_SEQUENCE, MASK)
            zero = tl.zeros_like(x[0])
            weight = tl.where(counts, 1.0, 0.0)
            if WEIGHTS >= 0:
                weight = x[WEIGHTS]
            if SEQUENCE_MEAN:
                weight = weight * (1.0 / of_sequence[0]).to(tl.float32)

            # log-ratio, surrogate and factors
            advantages = _advantages(x, numbers, ADVANTAGES, REWARDS)
            d = x[0] - x[OLD]
            shares = counts
            if LEVEL == "token":
                log_ratio = _log_ratio(x, numbers, OLD, TEACHER)
            elif LEVEL == "sequence-sum":
                log_ratio = of_sequence[1].to(tl.float32) + zero
            else:
                log_ratio = (of_sequence[1] / of_sequence[0]).to(tl.float32) + zero
            if BOUNDED:
                ratio, slope = _exp(_clamp(log_ratio, numbers[3], numbers[4]))
                slope = tl.where(_within(log_ratio, numbers[3], numbers[4]), slope, 0.0)
            else:
                ratio, slope = _exp(log_ratio)
            log_w = zero
            if LOG_W:
                log_w += _clamp(of_sequence[1 + (LEVEL != "token")].to(tl.float32), LEAST_LOG, 20.0)
            policy, by_ratio, by_lp, low, high = _surrogate(
                x, advantages, log_w, ratio, slope, numbers, SURROGATE, GIVEN, OLD
            )
            if LEVEL == "geometric":
                _, passes = _geometric(d, advantages, numbers)
                shares = counts & passes
                low = low | ((advantages < 0) & (d < -numbers[3]))
                high = high | ((advantages > 0) & (d > numbers[4]))
            factor = zero + 1.0
            for k in tl.static_range(len(FACTORS) // FACTOR):
                factor = factor * _factor(
                    x, advantages, of_sequence, numbers, FACTORS, k, AT_FACTORS + FACTOR_NUMBERS * k
                )

            new = (times(weight, times(factor, policy)),)
            penalties = ()
            for k in tl.static_range(PENALTY_COUNT):
                penalty = _penalty(x, numbers, PENALTIES, k, AT_PENALTIES + PENALTY_NUMBERS * k, OLD)
                penalties = penalties + (penalty[1], penalty[2], penalty[3])
                new = new + (times(weight, penalty[0]),)

            # derivatives
            for j in tl.static_range(len(GRADIENTS)):
                slope = zero
                if GRADIENTS[j] == 0:
                    if SPREAD:
                        slope = times(factor, by_lp)
                    else:
                        slope = times(factor, by_lp + by_ratio)
                for k in tl.static_range(PENALTY_COUNT):
                    coef = numbers[AT_PENALTIES + PENALTY_NUMBERS * k]
                    if GRADIENTS[j] == 0:
                        slope += coef * penalties[3 * k]
                    else:
                        if GRADIENTS[j] == PENALTIES[PENALTY * k + 1]:
                            slope += coef * penalties[3 * k + 1]
                        if GRADIENTS[j] == PENALTIES[PENALTY * k + 2]:
                            slope += coef * penalties[3 * k + 2]
                tl.store(slopes + j * tokens + at, times(weight, slope), mask=at < stop)
            if SPREAD:
                tl.store(share + at, shares.to(tl.int8), mask=at < stop)
                ratio_slopes += times(weight, times(factor, by_ratio))

            # metrics; of what does not count, d is 0
            new = new + (counts, counts & low, counts & high, -d, _expm1(d) - d, tl.where(counts, ratio, 0.0))
            new = new + (tl.where(counts, -ratio, float("-inf")), tl.where(counts, ratio, float("-inf")))
            if ENTROPY >= 0:
                new = new + (x[ENTROPY],)
            if len(FACTORS) > 0:
                new = new + (tl.where(counts, factor, 0.0), counts & (factor != 0))
            lanes = _added(lanes, new, KINDS)
        if SPREAD:
            ratio_slope = tl.sum(ratio_slopes.to(tl.float64), 0)
            if LEVEL != "sequence-sum":
                ratio_slope = ratio_slope / of_sequence[0]
            tl.store(spread + p, ratio_slope)

    field = tl.arange(0, FIELDS)
    row = _fields(lanes, field, KINDS, PLACES, FIELDS)
    tl.store(partials + field * programs + program, tl.where(field == AT_METRICS + METRICS, alive, row))

    tl.debug_barrier()
    ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    if ticket == programs - 1:
        tl.store(counter, 0)
        row = _join(partials, field, _maxima(field, KINDS, PLACES), 0, programs, programs)
        found = _pick(row, field, AT_METRICS)
        live = tl.maximum(found, 1.0)
        norm = 0.0 * live + numbers[0]
        if DENOMINATOR == "tokens":
            norm = norm / live
        elif DENOMINATOR == "sequences":
            norm = norm / tl.maximum(_pick(row, field, AT_METRICS + METRICS), 1.0)
        elif DENOMINATOR == "given":
            norm = norm / tl.load(denominator).to(tl.float64)
        loss = _pick(row, field, 0)
        for k in tl.static_range(PENALTY_COUNT):
            loss += numbers[AT_PENALTIES + PENALTY_NUMBERS * k] * _pick(row, field, 1 + k)
        ratios = _pick(row, field, AT_METRICS + 5)  # NaN if a ratio is, then so are their extremes
        extreme = tl.where(ratios != ratios, ratios, tl.where(field == AT_METRICS + RATIO_MIN, -row, row))
        value = tl.where(field < AT_METRICS, row * norm, tl.where(field == AT_METRICS, row, row / live))
        value = tl.where(field == AT_METRICS + METRICS, norm, value)
        at_extreme = (field == AT_METRICS + RATIO_MIN) | (field == AT_METRICS + RATIO_MAX)
        value = tl.where(at_extreme, tl.where(found > 0, extreme, 0.0), value)
        tl.store(results, loss * norm)
        tl.store(results + 1 + field, value, mask=field <= AT_METRICS + METRICS)


@triton.jit(do_not_specialize=COUNTS)
def gradient(
    slopes, share, spread, offsets,  # as ``evaluate`` has them
    norm,  # [] float64
    upstream,  # [] float32
    out,  # [G, T]
    tokens, sequences, steps, width, parts,
    COUNT: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """upstream norm slopes; with SPREAD its row 0 also has the derivative by the ratio of the token's sequence."""
    p = tl.program_id(0)
    sequence, begin, end, first_part, end_part = _part(p, offsets, tokens, sequences, steps, width, SPREAD)
    scale = (tl.load(upstream).to(tl.float64) * tl.load(norm)).to(tl.float32)
    stop = tokens
    ratio_slope = 0.0
    if SPREAD:
        stop = end
        field = tl.arange(0, 1)
        end_part = tl.where(sequence < sequences, tl.minimum(end_part, parts), 0)
        joined = _join(spread, field, field < 0, tl.maximum(first_part, 0), end_part, parts)
        ratio_slope = tl.sum(joined, 0).to(tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        for j in tl.static_range(COUNT):
            slope = tl.load(slopes + j * tokens + at, mask=at < stop, other=0.0)
            if SPREAD and j == 0:
                shares = tl.load(share + at, mask=at < stop, other=0) != 0
                slope += tl.where(shares, ratio_slope, 0.0)
            tl.store(out + j * tokens + at, slope * scale, mask=at < stop)
