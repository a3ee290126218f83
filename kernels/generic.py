"""Generic divergences: sum_j q_j f_j and sum_j q_j g_j, given both normalisers.

    z_s, z_t [rows, columns] -> sums [2, parts, rows] float64

One reading of both chunks, 8 bytes per element, some 100 operations: bound by arithmetic on most GPUs.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import finite, load_row, load_scaled
from logitless.kernels.divergences import pointwise


@triton.jit
def generic(
    student, student_stride, student_bias, student_inner,
    teacher, teacher_stride, teacher_bias, teacher_inner,
    numbers,  # [K, rows]: outer, max, log_sum of the student, of the teacher, ...; the parameters from PLACE on
    sums,  # [2, parts, rows] float64: of q f, of q g
    rows, columns, part_columns, parts,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_BIAS: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
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

    value = tl.zeros([ROWS, BLOCK], tl.float32)
    slope = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = live[:, None] & (j < end)[None, :]
        s, _ = load_scaled(
            student, student_stride, student_bias, student_inner, outer_s, row, j, inside, STUDENT_BIAS, STUDENT_CAPPED
        )
        t, _ = load_scaled(
            teacher, teacher_stride, teacher_bias, teacher_inner, outer_t, row, j, inside, TEACHER_BIAS, TEACHER_CAPPED
        )
        log_p, log_q = (t - max_t) - log_sum_t, (s - max_s) - log_sum_s
        qf, qg = pointwise(DIVERGENCE, log_p, log_q, numbers, PLACE, row, live, rows)
        value += tl.where(inside, qf, 0.0)
        slope += tl.where(inside, qg, 0.0)
    to = sums + part * rows + row
    tl.store(to, tl.sum(value, 1).to(tl.float64), mask=live)
    tl.store(to + parts * rows, tl.sum(slope, 1).to(tl.float64), mask=live)
