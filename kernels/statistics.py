"""Accumulators of rows: m = max_j s_j, sums over j of e^(s_j - m) times 1, (s_j - m), ..., for pairs the moments.

    z [rows, columns] float32 (or float16, bfloat16) -> accumulators [F, parts, rows] float64

One reading: 4 bytes per element and side, about 25 operations (40 with everything), one exponential per side. On an
H100 memory allows 34 float32 operations per 4 bytes. Programs: tiles of rows x parts of the columns.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import load_floor, load_row, load_scaled, scale
from logitless.kernels.elementary import LOWEST, times
from logitless.kernels.online import join, reported, step


@triton.jit
def statistics(
    # the chunks
    student, student_stride, student_bias, student_inner, student_floor,
    teacher, teacher_stride, teacher_bias, teacher_inner, teacher_floor,
    outer,  # [1 or 2, rows]: of the student, of the teacher
    targets,  # [rows] int64, or anything without TARGETS
    weights,  # [columns], or anything without WEIGHTS
    # results
    accumulators,  # [F, parts, rows] float64: max, sum, then target, first, square, weighted, mass,
                   # teacher_max, teacher_sum, forward, reverse, each where wanted
    argmax,  # [parts, rows] int64
    # sizes
    rows, columns, part_columns, parts,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_FILTERED: tl.constexpr,
    PAIR: tl.constexpr, TEACHER_BIAS: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER_FILTERED: tl.constexpr,
    TARGETS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr, WEIGHTED: tl.constexpr,
    WEIGHTS: tl.constexpr, ARGMAX: tl.constexpr, MOMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    live = row < rows
    begin = part * part_columns
    end = tl.minimum(begin + part_columns, columns)
    lane = tl.arange(0, BLOCK)
    outer_s = load_row(outer, 0, row, live, rows)
    floor_s = load_floor(student_floor, row, live, STUDENT_FILTERED)

    m = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.zeros([ROWS, BLOCK], tl.float32)
    square = tl.zeros([ROWS, BLOCK], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK], tl.float32)
    mass = tl.zeros([ROWS, BLOCK], tl.float32)
    place = tl.zeros([ROWS, BLOCK], tl.int32) + (begin + lane)[None, :]
    if PAIR:
        outer_t = load_row(outer, 1, row, live, rows)
        floor_t = load_floor(teacher_floor, row, live, TEACHER_FILTERED)
        m_t = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
        total_t = tl.zeros([ROWS, BLOCK], tl.float32)
        forward = tl.zeros([ROWS, BLOCK], tl.float32)
        reverse = tl.zeros([ROWS, BLOCK], tl.float32)

    for start in range(begin, end, BLOCK):
        j = start + lane
        inside = live[:, None] & (j < end)[None, :]
        s, _ = load_scaled(
            student, student_stride, student_bias, student_inner, outer_s, floor_s, row, j, inside,
            STUDENT_BIAS, STUDENT_CAPPED, STUDENT_FILTERED,
        )  # fmt: skip
        if ARGMAX:
            place = tl.where(s > m, j[None, :], place)
        m, rise, old, new = step(s, m)
        shifted = s - m
        if WEIGHTED:
            if WEIGHTS:
                w = tl.load(weights + j[None, :], mask=inside, other=0.0).to(tl.float32)
            else:
                w = tl.where(inside, 1.0, 0.0)
            weighted = weighted - rise * mass + times(w, shifted)
            mass += w
        if ENTROPY:
            first = times(old, first - rise * total) + times(new, shifted)
        if COLLISION:
            square = square * old * old + new * new
        if PAIR:
            t, _ = load_scaled(
                teacher, teacher_stride, teacher_bias, teacher_inner, outer_t, floor_t, row, j, inside,
                TEACHER_BIAS, TEACHER_CAPPED, TEACHER_FILTERED,
            )  # fmt: skip
            m_t, rise_t, old_t, new_t = step(t, m_t)
            if MOMENTS:
                difference = (t - m_t) - shifted
                forward = times(old_t, forward + total_t * (rise - rise_t)) + times(new_t, difference)
                reverse = times(old, reverse + total * (rise - rise_t)) + times(new, difference)
            total_t = total_t * old_t + new_t
        total = total * old + new

    joint, shift, factor = join(m)
    sum_s = tl.sum(total * factor, 1)
    field = parts * rows
    to = accumulators + part * rows + row
    tl.store(to, reported(joint, sum_s).to(tl.float64), mask=live)
    to += field
    tl.store(to, sum_s.to(tl.float64), mask=live)
    if TARGETS:
        y = tl.load(targets + row, mask=live, other=-1)
        here = live & (y >= begin) & (y < end)
        z_y = tl.load(student + row.to(tl.int64) * student_stride + y, mask=here, other=0.0).to(tl.float32)[:, None]
        bias_y = 0.0
        if STUDENT_BIAS:
            bias_y = tl.load(student_bias + y, mask=here, other=0.0)[:, None]
        s_y, _ = scale(z_y, bias_y, student_inner, outer_s, STUDENT_BIAS, STUDENT_CAPPED)
        if STUDENT_FILTERED:
            s_y = tl.where(z_y + bias_y < floor_s, float("-inf"), s_y)
        to += field
        tl.store(to, tl.where(here, tl.reshape(s_y, [ROWS]), 0.0).to(tl.float64), mask=live)
    if ENTROPY:
        to += field
        tl.store(to, tl.sum(times(factor, first + shift * total), 1).to(tl.float64), mask=live)
    if COLLISION:
        to += field
        tl.store(to, tl.sum(square * factor * factor, 1).to(tl.float64), mask=live)
    if WEIGHTED:
        to += field
        tl.store(to, tl.sum(weighted + shift * mass, 1).to(tl.float64), mask=live)
        to += field
        tl.store(to, tl.sum(mass, 1).to(tl.float64), mask=live)
    if PAIR:
        joint_t, shift_t, factor_t = join(m_t)
        sum_t = tl.sum(total_t * factor_t, 1)
        to += field
        tl.store(to, reported(joint_t, sum_t).to(tl.float64), mask=live)
        to += field
        tl.store(to, sum_t.to(tl.float64), mask=live)
        if MOMENTS:
            to += field
            moved = shift_t - shift
            tl.store(to, tl.sum(times(factor_t, forward + total_t * moved), 1).to(tl.float64), mask=live)
            to += field
            tl.store(to, tl.sum(times(factor, reverse + total * moved), 1).to(tl.float64), mask=live)
    if ARGMAX:
        place = tl.where(shift == 0.0, place, 2147483647)
        tl.store(argmax + part * rows + row, tl.min(place, 1).to(tl.int64), mask=live)
