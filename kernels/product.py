"""Product and statistics in one: hidden [rows, H] x weight [columns, H]^T, folded into accumulators tile by tile.

    s = outer * phi(inner * (hidden weight^T + bias))  ->  accumulators [F, parts, rows] float64, as kernels.statistics

No logit is written. 2 rows columns H FLOP a side on tensor cores, float32 sums; the weight is read once per tile of
rows that runs at a time, and the hidden states once per tile of columns, both from the second-level cache if it holds
them. Programs: tiles of rows x parts of the columns; neighbours share a part of the weight.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import load_row, scale
from logitless.kernels.elementary import LOWEST, exp, times
from logitless.kernels.online import reported


@triton.jit
def _logits(
    hidden, hidden_stride, weight, weight_stride, bias, inner, outer, row, live, j, valid, width,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scaled logits [ROWS, BLOCK], -inf outside."""
    k = tl.arange(0, DEPTH)
    at_hidden = hidden + row.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    at_weight = weight + j.to(tl.int64)[:, None] * weight_stride + k[None, :]
    z = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, DEPTH):
        inside = (start + k < width)[None, :]
        a = tl.load(at_hidden + start, mask=live[:, None] & inside, other=0.0)
        b = tl.load(at_weight + start, mask=valid[:, None] & inside, other=0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision=PRECISION)
    added = 0.0
    if BIAS:
        added = tl.load(bias + j, mask=valid, other=0.0)[None, :]
    s, _ = scale(z, added, inner, outer, BIAS, CAPPED)
    return tl.where(live[:, None] & valid[None, :], s, float("-inf"))


@triton.jit
def _raise(x, m):
    """(new maxima [ROWS], by how much the old ones lie below, factor of the sums so far)."""
    largest = tl.max(x, 1)
    new = tl.where(largest > m, largest, m)
    shift = m - new
    return new, shift, exp(shift)


@triton.jit
def product_statistics(
    hidden, hidden_stride, weight, weight_stride, student_bias, student_inner, width,
    teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_bias, teacher_inner,
    teacher_width,
    outer, targets, weights, accumulators, argmax,  # as in kernels.statistics
    rows, columns, part_columns, parts,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr,
    PAIR: tl.constexpr, TEACHER_BIAS: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    TARGETS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr, WEIGHTED: tl.constexpr,
    WEIGHTS: tl.constexpr, ARGMAX: tl.constexpr, MOMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    live = row < rows
    begin = part * part_columns
    end = tl.minimum(begin + part_columns, columns)
    outer_s = load_row(outer, 0, row, live, rows)

    m = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    target = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    place = tl.zeros([ROWS], tl.int32) + begin
    if TARGETS:
        y = tl.load(targets + row, mask=live, other=-1)[:, None]
    if PAIR:
        outer_t = load_row(outer, 1, row, live, rows)
        m_t = tl.full([ROWS], LOWEST, tl.float32)
        total_t = tl.zeros([ROWS], tl.float32)
        forward = tl.zeros([ROWS], tl.float32)
        reverse = tl.zeros([ROWS], tl.float32)

    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        valid = j < end
        s = _logits(
            hidden, hidden_stride, weight, weight_stride, student_bias, student_inner, outer_s, row, live, j, valid,
            width, STUDENT_BIAS, STUDENT_CAPPED, ROWS, BLOCK, DEPTH, PRECISION,
        )  # fmt: skip
        if ARGMAX:
            largest = tl.max(s, 1)
            at = tl.min(tl.where(s == largest[:, None], j[None, :], 2147483647), 1)
            place = tl.where(largest > m, at, place)
        m, shift, old = _raise(s, m)
        shifted = s - m[:, None]
        e = exp(shifted)
        if TARGETS:
            target += tl.sum(tl.where(j[None, :] == y, s, 0.0), 1)
        if WEIGHTED:
            if WEIGHTS:
                w = tl.load(weights + j, mask=valid, other=0.0).to(tl.float32)
            else:
                w = tl.where(valid, 1.0, 0.0)
            weighted += shift * mass + tl.sum(times(w[None, :] + tl.zeros_like(s), shifted), 1)
            mass += tl.sum(w, 0)
        if ENTROPY:
            first = times(old, first + shift * total) + tl.sum(times(e, shifted), 1)
        if COLLISION:
            square = square * old * old + tl.sum(e * e, 1)
        if PAIR:
            t = _logits(
                teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_bias,
                teacher_inner, outer_t, row, live, j, valid, teacher_width,
                TEACHER_BIAS, TEACHER_CAPPED, ROWS, BLOCK, DEPTH, PRECISION,
            )  # fmt: skip
            m_t, shift_t, old_t = _raise(t, m_t)
            shifted_t = t - m_t[:, None]
            e_t = exp(shifted_t)
            if MOMENTS:
                difference = shifted_t - shifted
                moved = shift_t - shift
                forward = times(old_t, forward + total_t * moved) + tl.sum(times(e_t, difference), 1)
                reverse = times(old, reverse + total * moved) + tl.sum(times(e, difference), 1)
            total_t = total_t * old_t + tl.sum(e_t, 1)
        total = total * old + tl.sum(e, 1)

    field = parts * rows
    to = accumulators + part * rows + row
    tl.store(to, reported(m, total).to(tl.float64), mask=live)
    to += field
    tl.store(to, total.to(tl.float64), mask=live)
    if TARGETS:
        to += field
        tl.store(to, target.to(tl.float64), mask=live)
    if ENTROPY:
        to += field
        tl.store(to, first.to(tl.float64), mask=live)
    if COLLISION:
        to += field
        tl.store(to, square.to(tl.float64), mask=live)
    if WEIGHTED:
        to += field
        tl.store(to, weighted.to(tl.float64), mask=live)
        to += field
        tl.store(to, mass.to(tl.float64), mask=live)
    if PAIR:
        to += field
        tl.store(to, reported(m_t, total_t).to(tl.float64), mask=live)
        to += field
        tl.store(to, total_t.to(tl.float64), mask=live)
        if MOMENTS:
            to += field
            tl.store(to, forward.to(tl.float64), mask=live)
            to += field
            tl.store(to, reverse.to(tl.float64), mask=live)
    if ARGMAX:
        tl.store(argmax + part * rows + row, place.to(tl.int64), mask=live)
