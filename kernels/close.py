"""Between statistics and gradient: joins the parts of rows, and closes open coefficients with the balance of q.

    accumulators [F, parts, rows] float64 -> numbers [K, rows] float32: max and log_sum of both sides, coefficient of q

What :func:`logitless.engine.statistics.close` says, in one launch instead of some twenty; numbers of the order of
rows x F are read, so it costs its launch. With ``SLOPES`` it runs again after the generic divergences.
"""

import triton
import triton.language as tl

from logitless.kernels.elementary import exp, log_of_sum, times


@triton.jit
def _relative(maximum, joint):
    """(maximum - joint, its exponential); joint is not -inf unless both are, and then nothing moves."""
    shift = (maximum - tl.where(joint == float("-inf"), 0.0, joint)).to(tl.float32)
    return shift, exp(shift)


@triton.jit
def close(
    accumulators,  # as kernels.statistics writes them
    slopes,  # [divergences, 2, slope_parts, rows] float64: as kernels.generic writes them
    numbers,  # [K, rows] float32 as kernels.gradient reads them; after its rows: the open coefficients of q and q lse
    open_q,  # which row of numbers is the first of those two
    rows, parts, slope_parts,
    TARGETS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr, WEIGHTED: tl.constexpr,
    PAIR: tl.constexpr, MOMENTS: tl.constexpr,
    ONE_HOT: tl.constexpr, P: tl.constexpr, WEIGHTS: tl.constexpr, Q_LOG_Q: tl.constexpr, Q_SQUARED: tl.constexpr,
    Q_LOG_RATIO: tl.constexpr, SLOPES: tl.constexpr,  # places of the divergences, as in kernels.gradient
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    field = parts * rows
    AT_FIRST: tl.constexpr = 2 + TARGETS
    AT_SQUARE: tl.constexpr = AT_FIRST + ENTROPY
    AT_MASS: tl.constexpr = AT_SQUARE + COLLISION + 1
    AT_TEACHER: tl.constexpr = AT_SQUARE + COLLISION + 2 * WEIGHTED

    joint = tl.full([ROWS], float("-inf"), tl.float64)
    joint_t = tl.full([ROWS], float("-inf"), tl.float64)
    for part in range(parts):
        at = accumulators + part * rows + row
        m = tl.load(at, mask=live, other=0.0)
        joint = tl.where((m > joint) | (m != m), m, joint)
        if PAIR:
            m_t = tl.load(at + AT_TEACHER * field, mask=live, other=0.0)
            joint_t = tl.where((m_t > joint_t) | (m_t != m_t), m_t, joint_t)

    total = tl.zeros([ROWS], tl.float64)
    first = tl.zeros([ROWS], tl.float64)
    square = tl.zeros([ROWS], tl.float64)
    mass = tl.zeros([ROWS], tl.float64)
    total_t = tl.zeros([ROWS], tl.float64)
    reverse = tl.zeros([ROWS], tl.float64)
    for part in range(parts):
        at = accumulators + part * rows + row
        shift, factor = _relative(tl.load(at, mask=live, other=0.0), joint)
        part_total = tl.load(at + field, mask=live, other=1.0)
        total += part_total * factor
        if ENTROPY:
            part_first = tl.load(at + AT_FIRST * field, mask=live, other=0.0)
            first += times(factor, part_first + shift * part_total)
        if COLLISION:
            square += tl.load(at + AT_SQUARE * field, mask=live, other=0.0) * factor * factor
        if WEIGHTED:
            mass += tl.load(at + AT_MASS * field, mask=live, other=0.0)
        if PAIR:
            shift_t, factor_t = _relative(tl.load(at + AT_TEACHER * field, mask=live, other=0.0), joint_t)
            total_t += tl.load(at + (AT_TEACHER + 1) * field, mask=live, other=1.0) * factor_t
            if MOMENTS:
                part_reverse = tl.load(at + (AT_TEACHER + 3) * field, mask=live, other=0.0)
                reverse += times(factor, part_reverse + part_total * (shift_t - shift))

    log_sum = log_of_sum(total.to(tl.float32))
    tl.store(numbers + rows + row, joint.to(tl.float32), mask=live)
    tl.store(numbers + 2 * rows + row, log_sum, mask=live)
    lse = tl.load(numbers + (open_q + 1) * rows + row, mask=live, other=0.0)
    q = tl.load(numbers + open_q * rows + row, mask=live, other=0.0)
    q += tl.where(lse == 0.0, 0.0, lse * (joint + log_sum).to(tl.float32))
    if PAIR:
        log_sum_t = log_of_sum(total_t.to(tl.float32))
        tl.store(numbers + 4 * rows + row, joint_t.to(tl.float32), mask=live)
        tl.store(numbers + 5 * rows + row, log_sum_t, mask=live)

    # the coefficients, in the order of kernels.gradient
    AT_ONE_HOT: tl.constexpr = 3 + 3 * PAIR
    if ONE_HOT:
        q -= tl.load(numbers + AT_ONE_HOT * rows + row, mask=live, other=0.0)
    AT_Q: tl.constexpr = AT_ONE_HOT + ONE_HOT
    AT_P: tl.constexpr = AT_Q + 1
    if P:
        q -= tl.load(numbers + AT_P * rows + row, mask=live, other=0.0)
    AT_WEIGHTS: tl.constexpr = AT_P + P
    if WEIGHTS:
        q -= tl.load(numbers + AT_WEIGHTS * rows + row, mask=live, other=0.0) * mass.to(tl.float32)
    AT_Q_LOG_Q: tl.constexpr = AT_WEIGHTS + WEIGHTS
    if Q_LOG_Q:
        entropy = log_sum - (first / total).to(tl.float32)
        q += tl.load(numbers + AT_Q_LOG_Q * rows + row, mask=live, other=0.0) * entropy
    AT_Q_SQUARED: tl.constexpr = AT_Q_LOG_Q + Q_LOG_Q
    if Q_SQUARED:
        collision = (square / total / total).to(tl.float32)
        q -= tl.load(numbers + AT_Q_SQUARED * rows + row, mask=live, other=0.0) * collision
    AT_Q_LOG_RATIO: tl.constexpr = AT_Q_SQUARED + Q_SQUARED
    if Q_LOG_RATIO:
        reverse_kl = (log_sum_t - log_sum) - (reverse / total).to(tl.float32)
        q -= tl.load(numbers + AT_Q_LOG_RATIO * rows + row, mask=live, other=0.0) * reverse_kl
    AT_GENERIC: tl.constexpr = AT_Q_LOG_RATIO + Q_LOG_RATIO
    for i in tl.static_range(len(SLOPES)):
        slope = tl.zeros([ROWS], tl.float64)
        for part in range(slope_parts):
            slope += tl.load(slopes + ((2 * i + 1) * slope_parts + part) * rows + row, mask=live, other=0.0)
        q -= tl.load(numbers + (AT_GENERIC + SLOPES[i]) * rows + row, mask=live, other=0.0) * slope.to(tl.float32)
    tl.store(numbers + AT_Q * rows + row, q, mask=live)
