// Optimal transport on a CPU: what goes on between the kernels of cpu/sinkhorn.h, and its bindings.
//
// A whole run is, per problem, in segments. The first half-iteration of a segment is in the log domain, and builds E. A
// half-iteration over columns whose factors leave their range is done again in the log domain, and ends the segment:
//
//     scaled   S = E v, T = E^T (scale u(S)), v from T        2 multiply-adds per entry
//     log      g' from the softmin of C - f down columns       an exponential per entry; one more for the next E
//
// Where epsilon changes, the half-iteration over columns is in the log domain too. Of every iteration the history keeps
// S and T (log: S and t) and which of both it was: from that and the start every segment, and every softmax in it, can
// be had again.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "bindings.h"
#include "copies.h"
#include "cpu/parallel.h"
#include "cpu/sinkhorn.h"

namespace logitless {
namespace sinkhorn {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr InUse<Kernels> kernels;

// Floats that start on a cache line.
class Floats {
public:
    explicit Floats(std::int64_t count) : room(new float[count + lanes]) {
        void* start = room.get();
        std::size_t space = (count + lanes) * sizeof(float);
        next = static_cast<float*>(std::align(lanes * sizeof(float), count * sizeof(float), start, space));
    }
    float* take(std::int64_t count) {
        float* taken = next;
        next += count;
        return taken;
    }

private:
    std::unique_ptr<float[]> room;  // not initialised
    float* next;
};

struct Costs {  // [problems, rows, columns]; strides 0 where problems share
    const float* at;
    std::int64_t problems, rows, columns, problem_stride, row_stride;

    Matrix operator[](std::int64_t problem) const { return {at + problem * problem_stride, row_stride, rows, columns}; }
};

struct Schedule {
    std::vector<double> annealed;
    double epsilon;
    std::int64_t limit;
    std::optional<double> tolerance;
    std::array<double, 2> rhos;

    double at(std::int64_t k) const { return k < fixed() ? annealed[k] : epsilon; }
    std::int64_t fixed() const { return annealed.size(); }  // the first with the last epsilon
};

struct History {  // [problems, limit, n + m], [problems, limit], [problems]; null if not kept
    float* sums;
    bool* logs;
    std::int64_t* returned;

    History of(std::int64_t problem, const Schedule& schedule, const Costs& costs) const {
        if (!sums) return *this;
        const std::int64_t k = problem * schedule.limit;
        return {sums + k * (costs.rows + costs.columns), logs + k, returned + problem};
    }
};

struct Inputs {
    Costs costs;
    const float *a, *b, *g;
    Schedule schedule;
    History history;
    int threads;  // for one problem
};

struct Outputs {
    float *f, *g, *rows;
    bool *reached, *stopped;
    std::int64_t* iterations;
};

struct Cotangents {
    const float *f, *g;
    float *cost, *a, *b;  // cost null if not wanted
    bool adds;            // to the cost's gradient
};

struct Transport {  // [problems], and its gradients: null if not wanted
    float *value, *cost, *a, *b;
};

// One problem and its scratch.
class Solver {
public:
    explicit Solver(const Inputs& in)
        : in(in), rows(in.costs.rows), columns(in.costs.columns), n(padded(rows)), m(padded(columns)),
          memory((n + pieces(rows)) * m + 15 * (n + m)) {
        w.n = n;
        w.m = m;
        w.E = memory.take(n * m);
        w.partial = memory.take(pieces(rows) * m);
        for (float** vector : {&w.weights_a, &w.s, &w.scale, &w.S, &w.r, &w.x, &f, &best_S}) *vector = memory.take(n);
        for (float** vector : {&w.weights_b, &w.g, &w.c, &w.v, &w.next, &w.T, &w.p, &w.reached, &t, &g, &best_v})
            *vector = memory.take(m);
    }

    void run(std::int64_t problem, const Outputs& out) {
        const Ended ended = solve(problem, in.history.of(problem, in.schedule, in.costs));
        out.iterations[problem] = ended.iterations;
        out.stopped[problem] = ended.stopped;
        std::copy_n(f, rows, out.f + problem * rows);
        std::copy_n(g, columns, out.g + problem * columns);
        std::copy_n(w.x, rows, out.rows + problem * rows);
        for (std::int64_t j = 0; j < columns; ++j) out.reached[problem * columns + j] = w.reached[j] != 0;
    }

    void run_backward(std::int64_t problem, const Cotangents& all) {
        const std::int64_t i = problem * rows, j = problem * columns;
        back(problem, in.history.of(problem, in.schedule, in.costs),
             {all.f + i, all.g + j, all.cost ? all.cost + i * columns : nullptr, all.a + i, all.b + j, false});
    }

    // With W the plan over its column sums, a softmax down columns of f alone, and k_j = sum_i W_ij C_ij,
    //
    //     <P, C> = sum_j columns_j k_j     x_i = sum_j P_ij (C_ij - k_j)     y_j = columns_j k_j
    //
    // and the gradient is x in log a, x / epsilon in f, y in log b, -y / rho_b in g, P (1 - (C - k_j) / epsilon) in C:
    // what all costs have in common is in none of the sums.
    void transport(std::int64_t problem, const Transport& out) {
        const bool wanted = out.cost || out.a;
        const std::int64_t limit = wanted ? in.schedule.limit : 0;
        Floats more(3 * n + 4 * m + limit * (rows + columns));
        float *x = more.take(n), *of_f = more.take(n), *of_a = more.take(n);
        float *k = more.take(m), *y = more.take(m), *of_g = more.take(m), *of_b = more.take(m);
        const std::unique_ptr<bool[]> logs(new bool[limit]);
        std::int64_t returned = 0;
        History history = {};
        if (wanted) history = {more.take(limit * (rows + columns)), logs.get(), &returned};
        solve(problem, history);

        least_costs(k);  // sums of what is above those lose no digits
        Plan call = plan_of_potentials();
        std::fill_n(of_f, rows, 1.0f);
        call.power = 1;
        call.origin = k;
        call.down = call.left = of_f;
        call.column_sums = w.partial;
        each(pieces(rows), [&](auto begin, auto end) { kernels->plan(call, begin, end); });
        double value = 0;
        for (std::int64_t j = 0; j < columns; ++j) {
            for (std::int64_t part = 0; part < pieces(rows); ++part) k[j] += w.partial[part * m + j];
            y[j] = w.p[j] * k[j];
            value += y[j];
        }
        out.value[problem] = static_cast<float>(value);
        if (!wanted) return;

        call.column_sums = nullptr;
        call.across = call.right = w.p;
        call.row_sums = x;
        call.E_slope = 1;
        call.EC_slope = -w.inverse;
        call.gradient = out.cost ? out.cost + problem * rows * columns : nullptr;
        each(pieces(rows), [&](auto begin, auto end) { kernels->plan(call, begin, end); });
        for (std::int64_t i = 0; i < rows; ++i) of_f[i] = x[i] * w.inverse;
        for (std::int64_t j = 0; j < columns; ++j) of_g[j] = w.b.balanced ? 0 : -y[j] / w.b.rho;
        back(problem, history, {of_f, of_g, call.gradient, of_a, of_b, true});
        if (!out.a) return;
        for (std::int64_t i = 0; i < rows; ++i)
            out.a[problem * rows + i] = w.weights_a[i] > 0 ? of_a[i] + x[i] / w.weights_a[i] : 0;
        for (std::int64_t j = 0; j < columns; ++j)
            out.b[problem * columns + j] = w.weights_b[j] > 0 ? of_b[j] + y[j] / w.weights_b[j] : 0;
    }

private:
    const Inputs& in;
    const std::int64_t rows, columns, n, m;
    Floats memory;
    Work w = {};
    float *f, *g, *t, *best_S, *best_v;

    struct Ended {
        std::int64_t iterations;
        bool stopped;
    };

    // To f, g, w.x (row sums) and w.reached.
    Ended solve(std::int64_t problem, const History& history) {
        const Schedule& schedule = in.schedule;
        const bool judged = schedule.tolerance.has_value();
        open(problem);
        std::fill_n(w.reached, m, 1.0f);
        double least = std::numeric_limits<double>::infinity(), unreached = 0;
        bool absorbed = false, held = false;
        std::int64_t k = 0, returned = 0;
        const auto let_go = [&] {  // the pair that is held, before its segment ends
            if (held) {
                kernels->row_potentials(w, best_S, f);
                kernels->column_potentials(w, best_v, g);
            }
            held = false;
        };
        bool stops = false;
        for (; k < schedule.limit; ++k) {
            if (!absorbed) absorb(schedule.at(k));
            iterate();
            if (!absorbed) unreached = weight_of_unreached_rows();
            double residual = 0;
            const bool scaled = k >= schedule.fixed() && kernels->columns(w, judged ? &residual : nullptr);
            if (!scaled) {
                let_go();
                residual = log_columns(judged);
            }
            remember(history, k, scaled);
            residual += unreached;
            if (std::isnan(residual)) residual = std::numeric_limits<double>::infinity();
            const bool last = k + 1 == schedule.limit;
            stops = judged && k >= schedule.fixed() && residual <= *schedule.tolerance;
            if (judged ? residual <= least || k <= schedule.fixed() : last) {
                least = residual;
                returned = k;
                held = scaled;
                if (scaled) {
                    std::memcpy(best_S, w.S, n * sizeof(float));
                    std::memcpy(best_v, w.next, m * sizeof(float));
                } else {
                    std::memcpy(f, w.x, n * sizeof(float));
                    std::memcpy(g, w.next, m * sizeof(float));
                }
            }
            if (stops || last) break;
            std::swap(scaled ? w.v : w.g, w.next);
            absorbed = scaled;
        }
        if (history.returned) *history.returned = returned;
        if (held) {
            std::swap(w.S, best_S);
            std::swap(w.v, best_v);
            kernels->row_potentials(w, w.S, f);
            kernels->column_potentials(w, w.v, g);
            each(n / lanes, [&](auto begin, auto end) { kernels->row_sums(w, begin * lanes, end * lanes, w.x); });
        } else {
            Plan call = plan_of_potentials();
            call.across = w.p;
            call.row_sums = w.x;
            each(pieces(rows), [&](auto begin, auto end) { kernels->plan(call, begin, end); });
        }
        return {k + 1, stops};
    }

    void back(std::int64_t problem, const History& history, const Cotangents& of) {
        constexpr std::int64_t together = 64;  // factors of rows and columns that wait for their product
        const Schedule& schedule = in.schedule;
        Floats more(together * (n + m) + 3 * n + 2 * m);
        float *us = more.take(together * n), *vs = more.take(together * m), *unused = more.take(n);
        float *of_f = more.take(n), *log_a = more.take(n), *log_b = more.take(m), *of_g = more.take(m);
        open(problem);
        std::fill_n(log_a, n, 0.0f);
        std::fill_n(log_b, m, 0.0f);
        spread(of.f, rows, n, of_f);
        spread(of.g, columns, m, of_g);
        const float size = std::max(largest(of_f, n), largest(of_g, m));
        const bool ordinary = size < 0x1p30f && size > 0x1p-60f;  // else quotients of it could overflow, or vanish
        const float unit = ordinary || !(size > 0 && size < infinity)
                               ? 1.0f
                               : std::exp2(std::max(std::floor(std::log2(size)), -120.0f));
        const auto times = [](float factor, std::int64_t count, float* of) {
            for (std::int64_t i = 0; i < count && factor != 1; ++i) of[i] *= factor;
        };
        times(1 / unit, n, of_f);
        times(1 / unit, m, of_g);
        float* const gradient = of.cost;
        if (gradient && of.adds) times(1 / unit, rows * columns, gradient);
        bool first = !of.adds;
        std::int64_t waiting = 0, start = schedule.limit;
        const auto add = [&] {
            if (gradient)
                each((rows + 31) / 32, [&](auto begin, auto end) {
                    kernels->add_back(w, begin * 32, std::min(end * 32, rows), waiting, us, vs, gradient, first);
                });
            first = false;
            waiting = 0;
        };
        const auto kept_at = [&](std::int64_t k) { return history.sums + k * (rows + columns); };
        const std::int64_t returned = *history.returned;
        float *const own_v = w.v, *const own_p = w.p;
        for (std::int64_t k = returned; k >= 0; --k) {
            const float* kept = kept_at(k);
            if (k < start) {
                if (waiting) add();
                for (start = k; start > 0 && !history.logs[start - 1]; --start) {}
                if (start > 0) {
                    column_potentials(kept_at(start - 1) + rows, side(schedule.rhos[1], schedule.at(start - 1)).damping, w.g);
                } else {
                    spread(in.g + problem * columns, columns, m, w.g);
                }
                absorb(schedule.at(start));
            }
            spread(kept, rows, n, w.S);
            w.v = vs + (waiting + 1) * m;
            w.p = vs + waiting * m;
            const bool log = history.logs[k];
            if (log) {
                if (gradient && first) std::fill_n(gradient, rows * columns, 0.0f);
                first = false;
                log_column_sums();
                for (std::int64_t j = 0; j < columns; ++j)
                    w.next[j] = w.weights_b[j] > 0 && kept[rows + j] < infinity ? w.b.damping * of_g[j] / w.T[j] : 0;
                each(pieces(rows), [&](auto begin, auto end) {
                    kernels->log_back(w, begin * piece, std::min(end * piece, rows), gradient);
                });
                std::fill(w.x + rows, w.x + n, 0.0f);
                w.v = w.p;
            } else {
                for (std::int64_t j = 0; j < columns; ++j)
                    w.p[j] = w.weights_b[j] > 0 && kept[rows + j] > 0 ? w.b.damping * of_g[j] / kept[rows + j] : 0;
                std::fill(w.p + columns, w.p + m, 0.0f);
            }
            if (k == start) {
                std::fill_n(w.v, m, 1.0f);
            } else {
                spread(kept_at(k - 1) + rows, columns, m, w.T);
                kernels->factors(w);
            }
            const Backward call = {w, k == returned ? of_f : nullptr, log, log_a, log_b,
                                   log ? unused : us + waiting * n, us + (waiting + (log ? 0 : 1)) * n};
            each(pieces(rows), [&](auto begin, auto end) {
                for (auto part = begin; part < end; ++part) kernels->iterate_back(call, part);
            });
            kernels->columns_back(call, of_g);
            waiting += log ? 1 : 2;
            if (waiting + 2 > together) add();
        }
        if (waiting) add();
        w.v = own_v;
        w.p = own_p;
        if (gradient) times(unit, rows * columns, gradient);
        times(unit, n, log_a);
        times(unit, m, log_b);
        for (std::int64_t i = 0; i < rows; ++i)
            of.a[i] = w.weights_a[i] > 0 ? log_a[i] / w.weights_a[i] : 0;
        for (std::int64_t j = 0; j < columns; ++j)
            of.b[j] = w.weights_b[j] > 0 ? log_b[j] / w.weights_b[j] : 0;
    }

    template <class Body>
    void each(std::int64_t count, const Body& body) const {
        parallel(count, std::int64_t{1} << 16, in.threads, body);
    }

    static void spread(const float* from, std::int64_t count, std::int64_t all, float* to) {
        std::copy_n(from, count, to);
        std::fill(to + count, to + all, 0.0f);
    }

    static float largest(const float* of, std::int64_t count) {
        float found = 0;
        for (std::int64_t i = 0; i < count; ++i) found = std::max(found, std::abs(of[i]));
        return found;
    }

    void open(std::int64_t problem) {
        w.cost = in.costs[problem];
        spread(in.a + problem * rows, rows, n, w.weights_a);
        spread(in.b + problem * columns, columns, m, w.weights_b);
        spread(in.g + problem * columns, columns, m, w.g);
    }

    static Side side(double rho, double epsilon) {
        if (std::isinf(rho)) return {true, infinity, 1.0f, 0.0f};
        return {false, static_cast<float>(rho), static_cast<float>(rho / (rho + epsilon)),
                static_cast<float>(1 / (rho + epsilon))};
    }

    void absorb(double epsilon) {
        w.epsilon = static_cast<float>(epsilon);
        w.inverse = static_cast<float>(1 / epsilon);
        w.a = side(in.schedule.rhos[0], epsilon);
        w.b = side(in.schedule.rhos[1], epsilon);
        std::fill_n(w.v, m, 1.0f);
        kernels->weighted(w.g, w.weights_b, w.epsilon, m, w.c);
        each((n + 31) / 32, [&](auto begin, auto end) { kernels->absorb(w, begin * 32, std::min(end * 32, n)); });
    }

    void iterate() {
        each(pieces(rows), [&](auto begin, auto end) {
            for (auto part = begin; part < end; ++part) kernels->iterate(w, part);
        });
    }

    double weight_of_unreached_rows() const {
        double sum = 0;
        for (std::int64_t i = 0; i < rows; ++i)
            if (w.S[i] == 0) sum += w.weights_a[i];
        return sum;
    }

    // Tops in c and totals in T, of the softmin down columns at the potentials of rows that S gives.
    void log_column_sums() {
        kernels->row_potentials(w, w.S, w.x);
        kernels->weighted(w.x, w.weights_a, w.epsilon, n, w.r);
        const Softmin call = {w.cost, w.r, w.inverse, w.c, w.T};
        each((columns + 63) / 64, [&](auto begin, auto end) {
            kernels->softmin_columns(call, begin * 64, std::min(end * 64, columns));
        });
    }

    // t, and next = g'; the columns' part of the residual.
    double log_columns(bool judged) {
        log_column_sums();
        kernels->column_potentials(w, w.v, g_before());
        double residual = 0;
        for (std::int64_t j = 0; j < columns; ++j) {
            t[j] = w.T[j] == 0 ? infinity : static_cast<float>(-(w.c[j] + w.epsilon * std::log(double{w.T[j]})));
            if (judged && w.weights_b[j] > 0) {
                const double b = w.weights_b[j], old = g_before()[j];
                const double met = b * std::exp((old - t[j]) / w.epsilon);
                residual += std::abs(met - (w.b.balanced ? b : b * std::exp(-old / w.b.rho)));
            }
            w.reached[j] = t[j] < infinity;
        }
        column_potentials(t, w.b.damping, w.next);
        return residual;
    }
    float* g_before() const { return w.p; }

    void column_potentials(const float* from, float damping, float* to) const {
        for (std::int64_t j = 0; j < columns; ++j)
            to[j] = w.weights_b[j] > 0 && from[j] < infinity ? damping * from[j] : 0;
        std::fill(to + columns, to + m, 0.0f);
    }

    void remember(const History& history, std::int64_t k, bool scaled) const {
        if (!history.sums) return;
        float* to = history.sums + k * (rows + columns);
        std::copy_n(w.S, rows, to);
        std::copy_n(scaled ? w.T : t, columns, to + rows);
        history.logs[k] = !scaled;
    }

    // Of every column, in rows that have weight; 0 where all are infinite.
    void least_costs(float* least) const {
        constexpr std::int64_t block = 1024;
        each((columns + block - 1) / block, [&](auto first, auto last) {
            const std::int64_t begin = first * block, end = std::min(last * block, columns);
            std::fill(least + begin, least + end, infinity);
            for (std::int64_t i = 0; i < rows; ++i)
                for (std::int64_t j = begin; w.weights_a[i] > 0 && j < end; ++j)
                    least[j] = std::min(least[j], w.cost.at[i * w.cost.stride + j]);
            std::replace(least + begin, least + end, infinity, 0.0f);
        });
    }

    // The plan of f and g over its column sums, and those, to p: met, and exponents below 0, as Problem.factors has it.
    Plan plan_of_potentials() {
        kernels->weighted(f, w.weights_a, w.epsilon, n, w.r);
        for (std::int64_t j = 0; j < columns; ++j) {
            const bool live = w.weights_b[j] > 0;
            w.c[j] = live ? g[j] / w.b.damping : -infinity;
            const float met = w.b.balanced ? 1.0f : std::exp(-g[j] / w.b.rho);
            w.p[j] = live && w.reached[j] ? w.weights_b[j] * met : 0;
        }
        Plan call = {};
        call.cost = w.cost;
        call.r = w.r;
        call.c = w.c;
        call.inverse = w.inverse;
        call.count = 1;
        return call;
    }
};

// Small problems go to threads whole, large ones one by one to all threads.
template <class Each>
void each_problem(Inputs& in, int threads, const Each& problem) {
    const Costs& costs = in.costs;
    const bool small = costs.rows * costs.columns < std::int64_t{1} << 18;
    in.threads = small ? 1 : threads;
    const auto body = [&](std::int64_t begin, std::int64_t end) {
        Solver solver(in);
        for (std::int64_t i = begin; i < end; ++i) problem(solver, i);
    };
    if (small)
        parallel(costs.problems, 4 * costs.rows * costs.columns, threads, body);
    else if (costs.problems)
        body(0, costs.problems);
}

// ---------------------------------------------------------------------------------------------------------- bindings

using CostArgument = std::pair<Address, std::array<std::int64_t, 5>>;
using ScheduleArgument =
    std::tuple<std::vector<double>, double, std::int64_t, std::optional<double>, std::array<double, 2>>;

Costs costs(const CostArgument& cost) {
    const auto& [address, n] = cost;
    return {pointer<const float>(address), n[0], n[1], n[2], n[3], n[4]};
}

Schedule schedule_of(const ScheduleArgument& of) {
    return std::apply([](const auto&... parts) { return Schedule{parts...}; }, of);
}

History history_of(const Addresses& of) {
    return {pointer<float>(of, "sums"), pointer<bool>(of, "logs"), pointer<std::int64_t>(of, "returned")};
}

void run(const CostArgument& cost, Address a, Address b, Address g, const ScheduleArgument& schedule,
         const Addresses& history, const Addresses& out, int threads) {
    Inputs in = {costs(cost), pointer<const float>(a), pointer<const float>(b), pointer<const float>(g),
                 schedule_of(schedule), history_of(history), 1};
    const Outputs outputs = {pointer<float>(out, "f"), pointer<float>(out, "g"), pointer<float>(out, "rows"),
                             pointer<bool>(out, "reached"), pointer<bool>(out, "stopped"),
                             pointer<std::int64_t>(out, "iterations")};
    const py::gil_scoped_release unlocked;
    each_problem(in, threads, [&](Solver& solver, std::int64_t i) { solver.run(i, outputs); });
}

void run_backward(const CostArgument& cost, Address a, Address b, Address g, const ScheduleArgument& schedule,
                  const Addresses& history, Address of_f, Address of_g, Address of_cost, Address of_a, Address of_b,
                  int threads) {
    Inputs in = {costs(cost), pointer<const float>(a), pointer<const float>(b), pointer<const float>(g),
                 schedule_of(schedule), history_of(history), 1};
    const Cotangents of = {pointer<const float>(of_f), pointer<const float>(of_g), pointer<float>(of_cost),
                           pointer<float>(of_a), pointer<float>(of_b), false};
    const py::gil_scoped_release unlocked;
    each_problem(in, threads, [&](Solver& solver, std::int64_t i) { solver.run_backward(i, of); });
}

void transport(const CostArgument& cost, Address a, Address b, Address g, const ScheduleArgument& schedule,
               const Addresses& results, int threads) {
    Inputs in = {costs(cost), pointer<const float>(a), pointer<const float>(b), pointer<const float>(g),
                 schedule_of(schedule), {}, 1};
    const Transport out = {pointer<float>(results, "value"), pointer<float>(results, "of_cost"),
                           pointer<float>(results, "of_a"), pointer<float>(results, "of_b")};
    const py::gil_scoped_release unlocked;
    each_problem(in, threads, [&](Solver& solver, std::int64_t i) { solver.transport(i, out); });
}

// body(problem, begin, end) for some of the things, `step` at a time, of every problem.
template <class Body>
void each_block(std::int64_t problems, std::int64_t things, std::int64_t step, std::int64_t size, int threads,
                const Body& body) {
    const std::int64_t blocks = (things + step - 1) / step;
    parallel(problems * blocks, std::min(step, things) * size, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t at = begin; at < end; ++at) {
            const std::int64_t first = at % blocks * step;
            body(at / blocks, first, std::min(first + step, things));
        }
    });
}

// top and total are [problems, rows], or of columns if `down`, c is [problems, columns], or of rows.
void softmin(const CostArgument& cost, Address c, double epsilon, bool down, Address top, Address total, int threads) {
    const Costs all = costs(cost);
    const py::gil_scoped_release unlocked;
    const std::int64_t along = down ? all.columns : all.rows, across = down ? all.rows : all.columns;
    each_block(all.problems, along, down ? 64 : 32, across, threads,
               [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
        const Softmin call = {all[i], pointer<const float>(c) + i * across, static_cast<float>(1 / epsilon),
                              pointer<float>(top) + i * along, pointer<float>(total) + i * along};
        (down ? kernels->softmin_columns : kernels->softmin_rows)(call, begin, end);
    });
}

// All of Plan, per problem; column_sums [problems, count, columns].
void plan(const CostArgument& cost, Address r, Address c, double epsilon, int power, int count,
          std::pair<double, double> slopes, const Addresses& of, int threads) {
    const Costs all = costs(cost);
    const std::int64_t rows = all.rows, columns = all.columns, parts = pieces(rows), wide = padded(columns);
    const auto get = [&](const char* name, std::int64_t problem, std::int64_t size) {
        float* found = pointer<float>(of, name);
        return found ? found + problem * size : nullptr;
    };
    float* sums = pointer<float>(of, "column_sums");
    const std::unique_ptr<float[]> partial(new float[sums ? all.problems * parts * count * wide : 0]);
    std::vector<Plan> calls;
    for (std::int64_t i = 0; i < all.problems; ++i)
        calls.push_back({all[i], pointer<const float>(r) + i * rows, pointer<const float>(c) + i * columns,
                         static_cast<float>(1 / epsilon), power, count, get("across", i, count * columns),
                         get("row_sums", i, rows * count), get("down", i, rows * count),
                         sums ? partial.get() + i * parts * count * wide : nullptr,
                         static_cast<float>(slopes.first), static_cast<float>(slopes.second),
                         get("left", i, rows * count), get("right", i, count * columns),
                         get("gradient", i, rows * columns), nullptr});
    const py::gil_scoped_release unlocked;
    each_block(all.problems, parts, 1, std::min(piece, rows) * columns, threads,
               [&](std::int64_t i, std::int64_t begin, std::int64_t end) { kernels->plan(calls[i], begin, end); });
    for (std::int64_t i = 0; sums && i < all.problems; ++i)
        for (std::int64_t k = 0; k < count; ++k) {
            float* to = sums + (i * count + k) * columns;
            for (std::int64_t part = 0; part < parts; ++part) {
                const float* from = partial.get() + ((i * parts + part) * count + k) * wide;
                for (std::int64_t j = 0; j < columns; ++j) to[j] = part ? to[j] + from[j] : from[j];
            }
        }
}

using Sizes = std::array<std::int64_t, 4>;  // problems, rows, columns, dimensions

void pairs(Address x, Address y, const Sizes& sizes, bool euclidean, Address cost, int threads) {
    const auto [problems, rows, columns, dimensions] = sizes;
    const py::gil_scoped_release unlocked;
    const auto body = [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
        kernels->pairs({pointer<const float>(x) + i * rows * dimensions,
                        pointer<const float>(y) + i * columns * dimensions, rows, columns, dimensions, euclidean,
                        pointer<float>(cost) + i * rows * columns}, begin, end);
    };
    each_block(problems, rows, 32, columns * dimensions, threads, body);
}

void signs(Address gradient, Address x, Address y, const Sizes& sizes, Address out, int threads) {
    const auto [problems, rows, columns, dimensions] = sizes;
    const py::gil_scoped_release unlocked;
    const auto body = [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
        kernels->signs({pointer<const float>(gradient) + i * rows * columns,
                        pointer<const float>(x) + i * rows * dimensions,
                        pointer<const float>(y) + i * columns * dimensions, rows, columns, dimensions,
                        pointer<float>(out) + i * rows * dimensions}, begin, end);
    };
    each_block(problems, rows, 32, columns * dimensions, threads, body);
}

}  // namespace

void bind(py::module_ module) {
    module.def("run", &run, py::arg("cost"), py::arg("a"), py::arg("b"), py::arg("g"), py::arg("schedule"),
               py::kw_only(), py::arg("history"), py::arg("out"), py::arg("threads"));
    module.def("run_backward", &run_backward, py::arg("cost"), py::arg("a"), py::arg("b"), py::arg("g"),
               py::arg("schedule"), py::kw_only(), py::arg("history"), py::arg("of_f"), py::arg("of_g"),
               py::arg("of_cost"), py::arg("of_a"), py::arg("of_b"), py::arg("threads"));
    module.def("transport", &transport, py::arg("cost"), py::arg("a"), py::arg("b"), py::arg("g"), py::arg("schedule"),
               py::kw_only(), py::arg("out"), py::arg("threads"));
    module.def("softmin", &softmin, py::arg("cost"), py::arg("c"), py::arg("epsilon"), py::kw_only(), py::arg("down"),
               py::arg("top"), py::arg("total"), py::arg("threads"));
    module.def("pairs", &pairs, py::arg("x"), py::arg("y"), py::arg("sizes"), py::kw_only(), py::arg("euclidean"),
               py::arg("cost"), py::arg("threads"));
    module.def("signs", &signs, py::arg("gradient"), py::arg("x"), py::arg("y"), py::arg("sizes"), py::kw_only(),
               py::arg("out"), py::arg("threads"));
    module.def("plan", &plan, py::arg("cost"), py::arg("r"), py::arg("c"), py::arg("epsilon"), py::kw_only(),
               py::arg("power"), py::arg("count"), py::arg("slopes"), py::arg("of"), py::arg("threads"));
}

}  // namespace sinkhorn
}  // namespace logitless
