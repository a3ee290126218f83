"""Sums over rows of two sides, given both normalisers.

    z_s, z_t [rows, columns] -> sums [2, parts, rows] float64: sum_j f_j and sum_j h_j of a generic divergence;
                                of a log-sum, x_j = a log p_j + b log q_j: m = max_j x_j and sum_j e^(x_j - m)

One reading of both chunks, 8 bytes per element, some 100 operations: bound by arithmetic on most GPUs.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import finite, load_floor, load_row, load_scaled
from logitless.kernels.divergences import LOG_SUM, load_parameters, log_summand, pointwise
from logitless.kernels.elementary import LOWEST
from logitless.kernels.online import join, reported, step

HIGHEST = tl.constexpr(3.0e38)  # stands for inf where differences to it must not be NaN


@triton.jit
def generic(
    student, student_stride, student_bias, student_inner, student_floor,
    teacher, teacher_stride, teacher_bias, teacher_inner, teacher_floor,
    numbers,  # [K, rows]: outer, max, log_sum of the student, of the teacher, ...; the parameters from PLACE on
    sums,  # [2, parts, rows] float64
    rows, columns, part_columns, parts,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_FILTERED: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER_FILTERED: tl.constexpr,
    DIVERGENCE: tl.constexpr, PLACE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    live = row < rows
    begin = part * part_columns
    end = tl.minimum(begin + part_columns, columns)
    outer_s = load_row(numbers, 0, row, live, rows)
    max_s = finite(load_row(numbers, 1, row, live, rows))
    log_sum_s = load_row(numbers, 2, row, live, rows)
    outer_t = load_row(numbers, 3, row, live, rows)
    max_t = finite(load_row(numbers, 4, row, live, rows))
    log_sum_t = load_row(numbers, 5, row, live, rows)
    floor_s = load_floor(student_floor, row, live, STUDENT_FILTERED)
    floor_t = load_floor(teacher_floor, row, live, TEACHER_FILTERED)
    parameters = load_parameters(DIVERGENCE, numbers, PLACE, row, live, rows)

    value = tl.zeros([ROWS, BLOCK], tl.float32)
    slope = tl.zeros([ROWS, BLOCK], tl.float32)
    m = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = live[:, None] & (j < end)[None, :]
        s, _ = load_scaled(
            student, student_stride, student_bias, student_inner, outer_s, floor_s, row, j, inside,
            STUDENT_BIAS, STUDENT_CAPPED, STUDENT_FILTERED,
        )  # fmt: skip
        t, _ = load_scaled(
            teacher, teacher_stride, teacher_bias, teacher_inner, outer_t, floor_t, row, j, inside,
            TEACHER_BIAS, TEACHER_CAPPED, TEACHER_FILTERED,
        )  # fmt: skip
        log_p, log_q = (t - max_t) - log_sum_t, (s - max_s) - log_sum_s
        if DIVERGENCE == LOG_SUM:
            x = log_summand(log_p, log_q, parameters)
            m, _, old, new = step(tl.where(x > HIGHEST, HIGHEST, x), m)
            total = total * old + new
        else:
            f, h = pointwise(DIVERGENCE, log_p, log_q, parameters)
            value += tl.where(inside, f, 0.0)
            slope += tl.where(inside, h, 0.0)

    to = sums + part * rows + row
    if DIVERGENCE == LOG_SUM:
        joint, _, factor = join(m)
        first, second = tl.where(joint == HIGHEST, float("inf"), joint), tl.sum(total * factor, 1)
        first = reported(first, second)
    else:
        first, second = tl.sum(value, 1), tl.sum(slope, 1)
    tl.store(to, first.to(tl.float64), mask=live)
    tl.store(to + parts * rows, second.to(tl.float64), mask=live)
