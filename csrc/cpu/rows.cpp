// Row kernels, compiled once per instruction set with LL_COPY as the copy's name (setup.py).
//
//   s = outer * phi(inner * (z + bias)), m = max_j s_j, log q_j = (s_j - m) - log_sum; t, m_t, log p from the teacher
//
//   statistics   sums of e^(s_j - m) times 1, (s_j - m), ...    one reading of z (and the teacher's z)
//   generic      sum_j f_j, sum_j h_j; log sum_j e^(x_j)        one reading
//   gradient     ds/dz times a combination of q, p, ...         one reading and one writing
//   floors       where a filter cuts a row                      two readings, the rest in a row of room per thread
//
// An element costs 4 bytes of reading per side (and 4 of writing) and per side an exponential, some 17 operations on
// whole vectors; a generic divergence costs five times that. With AVX-512 the former is about what memory can feed, so
// it must be asked in time: rows are prefetched some way ahead, past the ends of pages where the hardware's own
// prefetching stops. Without that the gradient in place takes twice as long.
//
// Accuracy: differences to the maximum first, exponentials of those; sums in float within a block, in double across
// blocks. Nothing that the linker could share with another copy may be used here (see number.h), so no std:: templates.

#include <cstdlib>

#include "sweep.h"

namespace logitless {
namespace {

constexpr int block = 512;  // floats: a handful of such buffers stay in the first-level cache

// Its softmax, given the normalizers.
struct Distribution : Row {
    float max, log_sum;

    LL_FUNCTION Distribution(const Chunk& chunk, const float* max, const float* log_sum, std::int64_t row)
        : Row(chunk, row), max(finite(max[row])), log_sum(log_sum[row]) {}

    LL_FUNCTION Vector log_probability(Vector s) const { return (s - Vector(max)) - Vector(log_sum); }
};

// ------------------------------------------------------------------------------------------------------- statistics

// Blocks are padded to whole groups of vectors, each with a sum of its own: additions to one would wait for each other.
constexpr int group = 4;

LL_FUNCTION int padded(int count) { return (count + group * width - 1) / (group * width) * (group * width); }

// The sum of term(column) over a padded block, lane by lane.
template <class Term>
LL_FUNCTION Vector sum_of(int count, const Term& term) {
    Vector sums[group] = {Vector(0.0f), Vector(0.0f), Vector(0.0f), Vector(0.0f)};
    for (int j = 0; j < count; j += group * width)
        for (int k = 0; k < group; ++k) sums[k] = sums[k] + term(j + k * width);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The running maximum of one side, and its block: scaled logits, then their differences to the maximum.
struct Side {
    alignas(64) float shifted[block];
    alignas(64) float e[block];  // exponentials of those
    float max = -infinity;
    Sum sum;

    // value(column, access) of every vector of the block
    template <class Value>
    LL_FUNCTION void fill(int count, const Value& value) {
        sweep(0, count, [&](std::int64_t j, auto access) { value(j, access).store(shifted + j); });
        for (int j = count; j < padded(count); ++j) shifted[j] = -infinity;
    }
    LL_FUNCTION void load(const Row& row, std::int64_t begin, int count) {
        if (row.filtered) fill(count, [&](std::int64_t j, auto access) { return row.scaled(access, begin + j).s; });
        else fill(count, [&](std::int64_t j, auto access) { return row.template scaled<false>(access, begin + j).s; });
    }

    LL_FUNCTION float block_max(int count) const {
        Vector found[group] = {Vector(-infinity), Vector(-infinity), Vector(-infinity), Vector(-infinity)};
        for (int j = 0; j < padded(count); j += group * width)
            for (int k = 0; k < group; ++k) found[k] = logitless::max(Vector::load(shifted + j + k * width), found[k]);
        return largest(logitless::max(logitless::max(found[0], found[1]), logitless::max(found[2], found[3])));
    }

    LL_FUNCTION void exponentiate(int count, const float* z) {
        const Vector origin(finite(max));
        sum.add(sum_of(padded(count), [&](int j) {
            prefetch(z + j);
            const Vector x = Vector::load(shifted + j) - origin;
            const Vector y = exp(x);
            x.store(shifted + j);
            y.store(e + j);
            return y;
        }));
    }

    // max drops a NaN; the sum has kept it.
    LL_FUNCTION double final_max() const {
        const double total = sum.total();
        return total == total ? max : total;
    }
};

LL_FUNCTION void put(double* to, std::int64_t row, double value) {
    if (to) to[row] = value;
}

void statistics_row(const Statistics& call, std::int64_t row) {
    const Row student(call.chunks.student, row);
    const bool paired = call.chunks.teacher.z != nullptr;
    const Row teacher(paired ? call.chunks.teacher : call.chunks.student, row);
    const std::int64_t columns = call.chunks.columns, target = call.targets ? call.targets[row] : -1;

    Side s, t;
    Sum first, square, weighted, weight_sum, forward, reverse;
    double target_logit = 0;
    std::int64_t max_block = 0;
    alignas(64) float room[block];  // for weights: ones where none are given, and the last block's with its padding
    for (float& weight : room) weight = 1;

    // The sums so far, seen from a new maximum: differences to it shrink by `shift`, exponentials of them by `factor`.
    const auto raise_student = [&](float largest) {
        const double shift = static_cast<double>(finite(s.max)) - finite(largest);
        const double factor = s.max == -infinity ? 1 : __builtin_exp(shift);
        first.rescale(factor, shift, s.sum);
        square.rescale(factor * factor, 0, square);
        weighted.rescale(1, shift, weight_sum);
        forward.rescale(1, -shift, t.sum);
        reverse.rescale(factor, -shift, s.sum);
        s.sum.rescale(factor, 0, s.sum);
        s.max = largest;
    };
    const auto raise_teacher = [&](float largest) {
        const double shift = static_cast<double>(finite(t.max)) - finite(largest);
        const double factor = t.max == -infinity ? 1 : __builtin_exp(shift);
        forward.rescale(factor, shift, t.sum);
        reverse.rescale(1, shift, s.sum);
        t.sum.rescale(factor, 0, t.sum);
        t.max = largest;
    };

    for (std::int64_t begin = 0; begin < columns; begin += block) {
        const int count = static_cast<int>(columns - begin < block ? columns - begin : block), all = padded(count);

        s.load(student, begin, count);
        if (target >= begin && target < begin + count) target_logit = s.shifted[target - begin];
        const float largest = s.block_max(count);
        if (largest > s.max) {
            raise_student(largest);
            max_block = begin;
        }
        if (paired) {
            t.load(teacher, begin, count);
            const float largest_t = t.block_max(count);
            if (largest_t > t.max) raise_teacher(largest_t);
            t.exponentiate(count, teacher.z + begin);
        }
        s.exponentiate(count, student.z + begin);

        if (call.first)
            first.add(sum_of(all, [&](int j) { return times(Vector::load(s.e + j), Vector::load(s.shifted + j)); }));
        if (call.square)
            square.add(sum_of(all, [&](int j) { return Vector::load(s.e + j) * Vector::load(s.e + j); }));
        if (call.weighted) {
            const float* weights = call.weights ? call.weights + begin : room;
            if (all > count) {
                std::memmove(room, weights, count * sizeof(float));
                std::memset(room + count, 0, (all - count) * sizeof(float));
                weights = room;
            }
            weight_sum.add(sum_of(all, [&](int j) { return Vector::load(weights + j); }));
            weighted.add(
                sum_of(all, [&](int j) { return times(Vector::load(weights + j), Vector::load(s.shifted + j)); }));
        }
        if (call.forward) {
            const auto difference = [&](int j) { return Vector::load(t.shifted + j) - Vector::load(s.shifted + j); };
            forward.add(sum_of(all, [&](int j) { return times(Vector::load(t.e + j), difference(j)); }));
            reverse.add(sum_of(all, [&](int j) { return times(Vector::load(s.e + j), difference(j)); }));
        }
    }

    put(call.max, row, s.final_max());
    put(call.sum, row, s.sum.total());
    put(call.target, row, target_logit);
    put(call.first, row, first.total());
    put(call.square, row, square.total());
    put(call.weighted, row, weighted.total());
    put(call.teacher_max, row, t.final_max());
    put(call.teacher_sum, row, t.sum.total());
    put(call.forward, row, forward.total());
    put(call.reverse, row, reverse.total());
    if (call.argmax) {
        const int count = static_cast<int>(columns - max_block < block ? columns - max_block : block);
        s.load(student, max_block, count);
        int j = 0;
        while (j < count - 1 && !(s.shifted[j] == s.max)) ++j;
        call.argmax[row] = max_block + j;
    }
}

// ---------------------------------------------------------------------------------------------------------- generic

// Both distributions of a row.
struct Pairing {
    Distribution student, teacher;

    template <class Functor, class Access>
    LL_FUNCTION Pointwise<Vector> at(const Functor& functor, Access access, std::int64_t j) const {
        const Vector log_q = student.log_probability(student.scaled(access, j).s);
        const Vector log_p = teacher.log_probability(teacher.scaled(access, j).s);
        return functor.at(log_p, log_q);
    }
};

LL_FUNCTION Pairing pairing(const Pair& chunks, const Normalizers& n, std::int64_t row) {
    return {{chunks.student, n.max, n.log_sum, row}, {chunks.teacher, n.teacher_max, n.teacher_log_sum, row}};
}

template <class Functor>
LL_FUNCTION void generic_row(const Generic& call, const Functor& functor, std::int64_t row) {
    const Pairing pair = pairing(call.chunks, call.normalizers, row);
    const std::int64_t columns = call.chunks.columns;
    Sum value, slope;
    for (std::int64_t begin = 0; begin < columns; begin += block) {
        Vector block_value(0.0f), block_slope(0.0f);
        sweep(begin, columns - begin < block ? columns : begin + block, [&](std::int64_t j, auto access) {
            prefetch(pair.student.z + j);
            prefetch(pair.teacher.z + j);
            const Pointwise<Vector> at = pair.at(functor, access, j);
            block_value = block_value + access.only(at.value);
            block_slope = block_slope + access.only(at.slope);
        });
        value.add(block_value);
        slope.add(block_slope);
    }
    call.value[row] = value.total();
    call.slope[row] = slope.total();
}

LL_FUNCTION void generic_row(const Generic& call, const LogSum& functor, std::int64_t row) {
    const Pairing pair = pairing(call.chunks, call.normalizers, row);
    const std::int64_t columns = call.chunks.columns;
    Side x;
    for (std::int64_t begin = 0; begin < columns; begin += block) {
        const int count = static_cast<int>(columns - begin < block ? columns - begin : block);
        x.fill(count, [&](std::int64_t j, auto access) {
            prefetch(pair.teacher.z + begin + j);
            return pair.at(functor, access, begin + j).value;
        });
        const float largest = x.block_max(count);
        if (largest > x.max) {
            x.sum.rescale(__builtin_exp(static_cast<double>(x.max) - largest), 0, x.sum);
            x.max = largest;
        }
        x.exponentiate(count, pair.student.z + begin);
    }
    call.value[row] = x.max == infinity ? infinity : x.max + __builtin_log(x.sum.total());
    call.slope[row] = functor.b;
}

// --------------------------------------------------------------------------------------------------------- gradient

// What the columns [begin, end) of a row owe to the divergences.
LL_FUNCTION void mix(const Gradient& call, const Pairing& pair, std::int64_t row, std::int64_t begin, std::int64_t end,
                     float* mixed) {
    for (int i = 0; i < call.divergence_count; ++i) {
        const Divergence& divergence = call.divergences[i];
        const Vector coefficient(divergence.coefficient[row]);
        RowSums::visit(divergence.functor, {divergence.parameters, row}, [&](auto functor) {
            sweep(begin, end, [&](std::int64_t j, auto access) {
                float* const to = mixed + (j - begin);
                const Vector others = i ? Vector::load(to) : Vector(0.0f);
                fma(coefficient, pair.at(functor, access, j).slope, others).store(to);
            });
        });
    }
}

template <bool filtered>
void gradient_row(const Gradient& call, std::int64_t row) {
    const std::int64_t columns = call.chunks.columns;
    float* out = call.out + row * call.out_stride;
    if (call.live && !call.live[row]) {
        std::memset(out, 0, columns * sizeof(float));
        return;
    }

    const Normalizers& n = call.normalizers;
    const Distribution student(call.chunks.student, n.max, n.log_sum, row);
    const bool paired = call.chunks.teacher.z && (call.p || call.q_log_ratio || call.divergence_count > 0);
    const Distribution teacher =
        paired ? Distribution(call.chunks.teacher, n.teacher_max, n.teacher_log_sum, row) : student;
    const Pairing pair = {student, teacher};

    const auto coefficient = [row](const float* of) { return Vector(of ? of[row] : 0.0f); };
    const Vector c_q = coefficient(call.q), c_p = coefficient(call.p), c_weights = coefficient(call.weights),
                 c_q_log_q = coefficient(call.q_log_q), c_q_squared = coefficient(call.q_squared),
                 c_q_log_ratio = coefficient(call.q_log_ratio);
    const float* weights = call.weight_vector;
    const float* rows = call.rows ? call.rows + row * call.rows_stride : nullptr;

    // The one-hot is added to the one vector that holds the target's column.
    const std::int64_t target = call.one_hot ? call.targets[row] : -1;
    const std::int64_t hot = target >= 0 && target < columns ? target / width * width : -1;
    float one_hot[width] = {};
    if (hot >= 0) one_hot[target - hot] = call.one_hot[row];

    alignas(64) float mixed[block];
    const std::int64_t step = call.divergence_count ? block : columns;
    for (std::int64_t begin = 0; begin < columns; begin += step) {
        const std::int64_t end = columns - begin < step ? columns : begin + step;
        if (call.divergence_count) mix(call, pair, row, begin, end, mixed);
        sweep(begin, end, [&](std::int64_t j, auto access) {
            prefetch(student.z + j);
            const auto [s, slope] = student.template scaled<filtered>(access, j);
            const Vector log_q = student.log_probability(s);
            const Vector q = exp(log_q);
            Vector total(0.0f);
            if (call.q) total = c_q * q;
            if (call.q_log_q) total = fma(c_q_log_q, times(q, log_q), total);
            if (call.q_squared) total = fma(c_q_squared, q * q, total);
            if (call.weights) total = total + (weights ? c_weights * access.load(weights + j) : c_weights);
            if (paired) {
                prefetch(teacher.z + j);
                const Vector log_p = teacher.log_probability(teacher.scaled(access, j).s);
                if (call.p) total = total + c_p * exp(log_p);  // rounded like c_q * q: the sum is exactly 0 where p = q
                if (call.q_log_ratio) total = fma(c_q_log_ratio, times(q, log_q - log_p), total);
            }
            if (call.divergence_count) total = total + Vector::load(mixed + (j - begin));
            if (rows) total = total + access.load(rows + j);
            if (j == hot) total = total + Vector::load(one_hot);
            access.store(filtered ? times(slope, total) : slope * total, out + j);
        });
    }
}

// ----------------------------------------------------------------------------------------------------------- floors

// Some scaled logits, with a vector of NaN behind them, of which no comparison is true.
struct Candidates {
    float* s;  // room for one vector more than there are
    std::int64_t count;
    float least, most;

    LL_FUNCTION void close() {
        for (int j = 0; j < width; ++j) s[count + j] = __builtin_nanf("");
    }

    // sum of term(s) over those that are at least `bound`
    template <class Term>
    LL_FUNCTION double sum_from(float bound, const Term& term) const {
        Sum sum;
        for (std::int64_t begin = 0; begin < count; begin += block) {
            const std::int64_t end = count - begin < block ? count : begin + block;
            Vector part(0.0f);
            for (std::int64_t j = begin; j < end; j += width) {
                const Vector x = Vector::load(s + j);
                part = part + select((x > Vector(bound)) | (x == Vector(bound)), term(x), Vector(0.0f));
            }
            sum.add(part);
        }
        return sum.total();
    }

    // Leaves those that are at least `bound`, or those below it.
    LL_FUNCTION void keep(float bound, bool upper) {
        Vector low(infinity), high(-infinity);
        std::int64_t kept = 0;
        for (std::int64_t j = 0; j < count; j += width) {
            const Vector x = Vector::load(s + j);
            const Mask wanted = upper ? (x > Vector(bound)) | (x == Vector(bound)) : Vector(bound) > x;
            low = min(select(wanted, x, Vector(infinity)), low);
            high = max(select(wanted, x, Vector(-infinity)), high);
            kept += compress(wanted, x, s + kept);
        }
        count = kept;
        least = -largest(-low);
        most = largest(high);
        close();
    }
};

// A number in (least, most]: in the middle, or in the middle of the floats between them.
LL_FUNCTION float between(float least, float most, bool of_floats) {
    float middle = least / 2 + most / 2;
    if (of_floats) {
        const auto order = [](std::int32_t bits) { return bits < 0 ? bits ^ 0x7fffffff : bits; };
        std::int32_t ends[2];
        std::memcpy(&ends[0], &least, sizeof least);
        std::memcpy(&ends[1], &most, sizeof most);
        const std::int32_t bits = order(static_cast<std::int32_t>(
            (static_cast<std::int64_t>(order(ends[0])) + order(ends[1])) >> 1));
        std::memcpy(&middle, &bits, sizeof middle);
    }
    return middle > least ? middle : most;
}

// The largest t for which the terms of candidates from t on have the sum `wanted` (else the least candidate). Halves the
// range of candidates; the middle of floats comes in where some lie far off.
template <class Term>
LL_FUNCTION float cut(Candidates candidates, double wanted, const Term& term) {
    double above = 0;
    for (bool of_floats = false; candidates.least < candidates.most; of_floats = !of_floats) {
        const float middle = between(candidates.least, candidates.most, of_floats);
        const double sum = above + candidates.sum_from(middle, term);
        if (sum < wanted) above = sum;
        candidates.keep(middle, !(sum < wanted));
    }
    return candidates.least;
}

// The smallest scaled logit that a filter keeps.
LL_FUNCTION float smallest_kept(const Floors& call, Candidates all) {
    if (call.filter == Filter::min_p) return all.most + static_cast<float>(call.number);
    if (call.filter == Filter::top_k) {
        all.keep(-__FLT_MAX__, true);
        return all.count <= call.number ? -infinity : cut(all, call.number, [](Vector) { return Vector(1.0f); });
    }
    const Vector origin(all.most);
    const auto e = [origin](Vector s) { return exp(s - origin); };
    const double sum = all.sum_from(-infinity, e);
    // What lies below has less mass than (1 - p) e^max.
    all.keep(all.most - static_cast<float>(__builtin_log(call.chunks.columns / (1 - call.number)) + 1), true);
    return cut(all, call.number * sum, e);
}

// `room` for the row and a vector more.
LL_FUNCTION void floors_row(const Floors& call, std::int64_t row, float* room) {
    const Row student(call.chunks.student, row);
    const std::int64_t columns = call.chunks.columns;
    Candidates all = {room, columns, -infinity, -infinity};
    all.close();
    sweep(0, columns, [&](std::int64_t j, auto access) {
        prefetch(student.z + j);
        access.store(student.scaled(access, j).s, room + j);
    });
    Vector most(-infinity);
    for (std::int64_t j = 0; j < columns; j += width) most = max(Vector::load(room + j), most);
    all.most = largest(most);

    const float kept = all.most == -infinity ? -infinity : smallest_kept(call, all);
    // Halfway between the smallest x that is kept and the largest that is not.
    Vector lowest(infinity), highest(-infinity);
    sweep(0, columns, [&](std::int64_t j, auto access) {
        prefetch(student.z + j);
        const Vector x = student.raw(access, j);
        const Vector s = access.only(student.scaled(access, j).s, __builtin_nanf(""));
        lowest = min(select((s > Vector(kept)) | (s == Vector(kept)), x, Vector(infinity)), lowest);
        highest = max(select(Vector(kept) > s, x, Vector(-infinity)), highest);
    });
    const float low = -largest(-lowest), high = largest(highest), middle = high / 2 + low / 2;
    call.floors[row] = high == -infinity ? high : middle > high ? middle : low;
}

// Every row of a call, and the copy's entry in rows.h.

void statistics(const Statistics& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    for (std::int64_t row = begin; row < end; ++row) statistics_row(call, row);
}

void generic(const Generic& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    for (std::int64_t row = begin; row < end; ++row)
        RowSums::visit(call.divergence.functor, {call.divergence.parameters, row},
                       [&](auto functor) { generic_row(call, functor, row); });
}

void gradient(const Gradient& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    const auto one = call.chunks.student.floor ? gradient_row<true> : gradient_row<false>;
    for (std::int64_t row = begin; row < end; ++row) one(call, row);
}

void floors(const Floors& call, std::int64_t begin, std::int64_t end) {
    const FlushDenormals guard;
    float* const room = static_cast<float*>(std::malloc((call.chunks.columns + width) * sizeof(float)));
    for (std::int64_t row = begin; row < end; ++row) floors_row(call, row, room);
    std::free(room);
}

constexpr RowKernels kernels = {statistics, generic, gradient, floors};

}  // namespace

const RowKernels RowKernels::LL_COPY = kernels;

}  // namespace logitless
