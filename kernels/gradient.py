"""The gradient of any loss here: one combination of the basis, with coefficients per row.

    dz_j = ds_j/dz_j * [ one_hot 1[j=y] + q q_j + p p_j + weights w_j + q_log_q q_j log q_j + q_squared q_j^2
                         + q_log_ratio q_j (log q_j - log p_j) + sum_k c_k h_k(p_j, q_j) + rows_j ]

    z_s (and z_t) [rows, columns] float32 -> out [rows, columns]: float32 (z_s itself, say), or bfloat16 or float16

One reading and one writing: 4 bytes per element and side, and 4 or 2. A program does ROWS x BLOCK elements.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import finite, load_floor, load_row, load_scaled
from logitless.kernels.divergences import derivative
from logitless.kernels.elementary import exp, times


@triton.jit
def gradient(
    student, student_stride, student_bias, student_inner, student_floor,
    teacher, teacher_stride, teacher_bias, teacher_inner, teacher_floor,
    numbers,  # [K, rows]: outer, max, log_sum of the student (and of the teacher), then the coefficients that are
              # given in the order of the flags below, then of each divergence its coefficient and its parameters,
              # and of each log-sum also its value
    targets,  # [rows] int64
    weights,  # [columns]
    row_gradient, row_gradient_stride,  # [rows, columns]
    live,  # [rows] bool
    out, out_stride,
    rows, columns,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_FILTERED: tl.constexpr,
    PAIR: tl.constexpr, TEACHER_BIAS: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER_FILTERED: tl.constexpr,
    ONE_HOT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, WEIGHTS: tl.constexpr, Q_LOG_Q: tl.constexpr,
    Q_SQUARED: tl.constexpr, Q_LOG_RATIO: tl.constexpr, DIVERGENCES: tl.constexpr, PLACES: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, ROW_GRADIENT: tl.constexpr, LIVE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    inside = here[:, None] & (j < columns)[None, :]

    s, slope = load_scaled(
        student, student_stride, student_bias, student_inner, load_row(numbers, 0, row, here, rows),
        load_floor(student_floor, row, here, STUDENT_FILTERED), row, j, inside,
        STUDENT_BIAS, STUDENT_CAPPED, STUDENT_FILTERED,
    )  # fmt: skip
    max_s, log_sum_s = load_row(numbers, 1, row, here, rows), load_row(numbers, 2, row, here, rows)
    log_q = (s - finite(max_s)) - log_sum_s
    q = exp(log_q)
    if PAIR:
        t, _ = load_scaled(
            teacher, teacher_stride, teacher_bias, teacher_inner, load_row(numbers, 3, row, here, rows),
            load_floor(teacher_floor, row, here, TEACHER_FILTERED), row, j, inside,
            TEACHER_BIAS, TEACHER_CAPPED, TEACHER_FILTERED,
        )  # fmt: skip
        max_t, log_sum_t = load_row(numbers, 4, row, here, rows), load_row(numbers, 5, row, here, rows)
        log_p = (t - finite(max_t)) - log_sum_t

    total = tl.zeros([ROWS, BLOCK], tl.float32)
    AT_ONE_HOT: tl.constexpr = 3 + 3 * PAIR
    if ONE_HOT:
        y = tl.load(targets + row, mask=here, other=-1)[:, None]
        total += tl.where(j[None, :] == y, load_row(numbers, AT_ONE_HOT, row, here, rows), 0.0)
    AT_Q: tl.constexpr = AT_ONE_HOT + ONE_HOT
    if Q:
        total += load_row(numbers, AT_Q, row, here, rows) * q
    AT_P: tl.constexpr = AT_Q + Q
    if P:
        total += load_row(numbers, AT_P, row, here, rows) * exp(log_p)
    AT_WEIGHTS: tl.constexpr = AT_P + P
    if WEIGHTS:
        c = load_row(numbers, AT_WEIGHTS, row, here, rows)
        if WEIGHT_VECTOR:
            c = c * tl.load(weights + j[None, :], mask=inside, other=0.0).to(tl.float32)
        total += c
    AT_Q_LOG_Q: tl.constexpr = AT_WEIGHTS + WEIGHTS
    if Q_LOG_Q:
        total += load_row(numbers, AT_Q_LOG_Q, row, here, rows) * times(q, log_q)
    AT_Q_SQUARED: tl.constexpr = AT_Q_LOG_Q + Q_LOG_Q
    if Q_SQUARED:
        total += load_row(numbers, AT_Q_SQUARED, row, here, rows) * (q * q)
    AT_Q_LOG_RATIO: tl.constexpr = AT_Q_SQUARED + Q_SQUARED
    if Q_LOG_RATIO:
        total += load_row(numbers, AT_Q_LOG_RATIO, row, here, rows) * times(q, log_q - log_p)
    AT_GENERIC: tl.constexpr = AT_Q_LOG_RATIO + Q_LOG_RATIO
    for i in tl.static_range(len(DIVERGENCES)):
        at = AT_GENERIC + PLACES[i]
        h = derivative(DIVERGENCES[i], log_p, log_q, numbers, at + 1, row, here, rows)
        total += load_row(numbers, at, row, here, rows) * h
    if ROW_GRADIENT:
        from_rows = row_gradient + row.to(tl.int64)[:, None] * row_gradient_stride + j[None, :]
        total += tl.load(from_rows, mask=inside, other=0.0)
    if STUDENT_FILTERED:
        total = times(slope, total)
    else:
        total = total * slope
    if LIVE:
        alive = tl.load(live + row, mask=here, other=0)
        total = tl.where((alive != 0)[:, None], total, 0.0)
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + j[None, :], total.to(out.dtype.element_ty), mask=inside)
