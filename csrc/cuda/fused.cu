// Statistics of rows, and statistics together with the gradient, with one reading of each row.
//
//   s = outer * phi(inner * (z + bias)), m = max_j s_j, sums of e^(s_j - m) times 1, (s_j - m), ...; teacher alike
//   divergences: sum_j f_j, sum_j h_j with log q_j = (s_j - m) - log_sum
//   dz_j = ds_j/dz_j * [one_hot 1[j=y] + q q_j + p p_j + ...], q with its balance added (Row::close)
//
// z, the teacher's, and the gradient (in place, say) are [rows, columns], each float32, bf16 or fp16. Traffic per
// element: its 4 or 2 bytes read once a side and written once. At 3.0 TB/s, 1024 rows of 128256 columns of float32:
// statistics 0.18 ms (0.35 with a teacher), with the gradient in place 0.35 ms (0.53), with a bf16 gradient 0.26 ms
// (0.44).
//
// A block loads its part of a row into shared memory, all of it at once, and works on it there: maxima, sums, the sums
// of the terms, the gradient. Several blocks share a processor, so that one's loads fly while another computes. A row
// too long for that is shared by a cluster, whose blocks exchange maxima and sums through distributed shared memory. A
// row too long for a cluster goes through in tiles, which gives its statistics; its gradient takes a second reading
// (passes.cu). A thread reads no quad but those it has loaded itself: barriers are for the reductions alone.
//
// Instances: output type (none, float32, bf16, fp16) x with or without a teacher. The list of divergences is within.

#include <map>
#include <mutex>
#include <tuple>

#include "launch.cuh"
#include "passes.h"

namespace logitless::cuda {
namespace {

struct Fused {
    Call call;
    int capacity;  // quads of a side that a block can hold
};

// At the start of a block's shared memory; the student's quads follow, then the teacher's.
struct Shared {
    Exchange exchange;
    Accumulators accumulators;
    Row row;
    double balance;  // of the terms
};
constexpr std::size_t shared_head = (sizeof(Shared) + 15) / 16 * 16;

struct Nothing {};  // the output type of statistics alone

// The quads [begin, begin + count) of a row that this thread works on.
template <class Body>
__device__ __forceinline__ void sweep(int begin, int count, const Body& body) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) body(i, begin + i);
}

// float32 goes past the registers, all of it in flight at once; what must be widened takes some quads at a time.
__device__ __forceinline__ void load(const Side& side, const Span& span, int begin, int count, float4* held) {
    if (side.chunk.type != Type::float32) {
        constexpr int group = 4;
        for (int i = threadIdx.x; i < count; i += group * blockDim.x) {
            Quad z[group];
#pragma unroll
            for (int g = 0; g < group; ++g)
                if (i + g * static_cast<int>(blockDim.x) < count) z[g] = side.read(span, begin + i + g * blockDim.x);
#pragma unroll
            for (int g = 0; g < group; ++g)
                if (i + g * static_cast<int>(blockDim.x) < count) held[i + g * blockDim.x] = pack(z[g]);
        }
        return;
    }
    sweep(begin, count, [&](int i, int v) {
        const float* from = reinterpret_cast<const float*>(side.z()) + span.column(v);
        if (span.whole(v) && aligned<16>(from)) {
            __pipeline_memcpy_async(held + i, from, 16);
            return;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (span.holds(v, k)) __pipeline_memcpy_async(reinterpret_cast<float*>(held + i) + k, from + k, 4);
    });
}

// z becomes x where it lies; the maximum of s.
__device__ __forceinline__ float prepare(const Side& side, const Span& span, int begin, int count, float4* held) {
    float found = -infinity;
    sweep(begin, count, [&](int i, int v) {
        Quad x = get(held[i]);
        if (!side.plain()) {
            x = side.phi(span, v, x);
            held[i] = pack(x);
        }
        const Quad s = side.scaled(span, v, x);
        found = fmaxf(found, largest(s));
    });
    return found;
}

// Which of the sums somebody wants.
__device__ __forceinline__ unsigned wanted_sums(const Call& call) {
    const Statistics& to = call.statistics;
    return 1u << total | (to.target ? 1u << target : 0) | (to.first ? 1u << first : 0) |
           (to.square ? 1u << square : 0) | (to.weighted ? 1u << weighted : 0) |
           (to.weighted || to.mass ? 1u << mass : 0) | (to.teacher_sum ? 1u << teacher_total : 0) |
           (to.forward || to.reverse ? 1u << forward | 1u << reverse : 0);
}

template <class Out, bool paired>
__global__ void __launch_bounds__(most_threads_for(paired), 2) row_kernel(const __grid_constant__ Fused fused) {
    LL_DYN_SMEM(unsigned char, memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    float4* const held = reinterpret_cast<float4*>(memory + shared_head);
    float4* const held_t = held + fused.capacity;

    const Call& call = fused.call;
    const Statistics& statistics = call.statistics;
    const Combination& c = call.combination;
    const unsigned wanted = wanted_sums(call);
    const Cluster cluster;
    Reduction reduce{shared.exchange, cluster};
    const bool first_thread = threadIdx.x == 0;

    for (std::int64_t row = blockIdx.x / cluster.size; row < call.rows; row += gridDim.x / cluster.size) {
        const Side student(call.student, row);
        const Side teacher = paired ? Side(call.teacher, row) : student;
        const Span span = student.span(call.columns);
        const int share = (span.quads() + cluster.size - 1) / cluster.size;
        const int begin = cluster.rank * share, left = span.quads() - begin;
        const int y = column_of(statistics.targets, row, span.columns);
        if (first_thread) shared.accumulators.clear();

        // More than one tile only where the row's gradient is not wanted here.
        int count = 0;
        for (int done = 0; done < ::max(share, 1); done += fused.capacity) {
            const int start = begin + done;
            count = ::max(0, ::min(fused.capacity, ::min(share, left) - done));
            load(student, span, start, count, held);
            if constexpr (paired) load(teacher, span, start, count, held_t);
            __pipeline_commit();
            __pipeline_wait_prior(0);

            float maxima[2] = {prepare(student, span, start, count, held), -infinity};
            if constexpr (paired) maxima[1] = prepare(teacher, span, start, count, held_t);
            reduce.template operator()<Max>(maxima, paired ? 3u : 1u);
            bool raised = false;
            if (first_thread) {
                const double largest = shared.exchange.total[0];
                raised = largest > shared.accumulators.max;
                shared.accumulators.raise(largest, paired ? shared.exchange.total[1] : -infinity);
            }
            block_barrier<3>();

            const float origin = static_cast<float>(shared.accumulators.max), m = finite(origin);
            const float m_t = finite(static_cast<float>(shared.accumulators.teacher_max));
            float found[sums] = {};
            int position[1] = {span.columns};
            sweep(start, count, [&](int i, int v) {
                const Quad s = student.scaled(span, v, get(held[i]));
                const Quad shifted = each([&](int k) { return s.at[k] - m; });
                const Quad e = each([&](int k) { return exp(shifted.at[k]); });
                found[total] += sum(e);
                if (static_cast<unsigned>(y - span.column(v)) < 4)
                    found[target] = sum(each([&](int k) { return span.column(v) + k == y ? s.at[k] : 0.0f; }));
                if (statistics.first) found[first] += sum(each([&](int k) { return times(e.at[k], shifted.at[k]); }));
                if (statistics.square) found[square] += sum(each([&](int k) { return e.at[k] * e.at[k]; }));
                if (wanted >> mass & 1) {
                    const Quad w = statistics.weights
                                       ? span.read(statistics.weights, v)
                                       : each([&](int k) { return span.holds(v, k) ? 1.0f : 0.0f; });
                    found[mass] += sum(w);
                    found[weighted] += sum(each([&](int k) { return times(w.at[k], shifted.at[k]); }));
                }
                if (statistics.argmax) {
#pragma unroll
                    for (int k = 3; k >= 0; --k)
                        if (s.at[k] == origin && span.holds(v, k) && span.column(v) + k < position[0])
                            position[0] = span.column(v) + k;
                }
                if constexpr (paired) {
                    const Quad t = teacher.scaled(span, v, get(held_t[i]));
                    const Quad shifted_t = each([&](int k) { return t.at[k] - m_t; });
                    const Quad e_t = each([&](int k) { return exp(shifted_t.at[k]); });
                    found[teacher_total] += sum(e_t);
                    if (wanted >> forward & 1) {
                        const Quad d = each([&](int k) { return shifted_t.at[k] - shifted.at[k]; });
                        found[forward] += sum(each([&](int k) { return times(e_t.at[k], d.at[k]); }));
                        found[reverse] += sum(each([&](int k) { return times(e.at[k], d.at[k]); }));
                    }
                }
            });
            reduce.template operator()<Add>(found, wanted);
            if (first_thread)
                for (int i = 0; i < sums; ++i)
                    if (wanted >> i & 1) shared.accumulators.sum[i] += shared.exchange.total[i];
            if (statistics.argmax) {
                block_barrier<4>();
                reduce.template operator()<Min>(position, 1u);
                if (first_thread) {
                    const auto column = static_cast<std::int64_t>(shared.exchange.total[0]);
                    if (column < span.columns && (raised || done == 0 || column < shared.accumulators.argmax))
                        shared.accumulators.argmax = column;
                }
            }
            block_barrier<5>();
        }

        if (first_thread) {
            shared.accumulators.keep_nan();
            if (cluster.rank == 0) shared.accumulators.put(call, row);
        }
        if constexpr (!std::is_same_v<Out, Nothing>) {
            const auto close = [&] { shared.row.close(c, shared.accumulators, shared.balance, row); };
            if (first_thread) {
                shared.row.coefficients(c, row);
                shared.row.normalize(shared.accumulators);
                shared.balance = 0;
                if (!paired || c.term_count == 0) close();
            }
            block_barrier<6>();

            // One term alone leaves all that the gradient owes to the teacher in the teacher's place.
            const bool mixed = paired && c.term_count == 1;
            if constexpr (paired) {
                for (int term = 0; term < c.term_count; ++term) {
                    const Row r = shared.row;
                    const Term& of = c.terms[term];
                    const float coefficient = of.coefficient[row];
                    float found[2] = {};
                    Divergences::visit(of.functor, {of.parameters, row}, [&](auto functor) {
                        sweep(begin, count, [&](int i, int v) {
                            const Quad s = student.scaled(span, v, get(held[i]));
                            const Quad t = teacher.scaled(span, v, get(held_t[i]));
                            Quad value, slope;
#pragma unroll
                            for (int k = 0; k < 4; ++k) {
                                const auto at = functor.at(r.log_p(t.at[k]), r.log_q(s.at[k]));
                                value.at[k] = at.value;
                                slope.at[k] = at.slope;
                            }
                            found[0] += sum(value);
                            found[1] += sum(slope);
                            if (mixed) held_t[i] = pack(each([&](int k) {
                                const float rest = of_teacher(c, r, r.log_p(t.at[k]), r.log_q(s.at[k]));
                                return fma(coefficient, slope.at[k], rest);
                            }));
                        });
                    });
                    reduce.template operator()<Add>(found, 3u);
                    if (first_thread) {
                        if (cluster.rank == 0) {
                            if (of.value) of.value[row] = shared.exchange.total[0];
                            if (of.slope) of.slope[row] = shared.exchange.total[1];
                        }
                        shared.balance += coefficient * shared.exchange.total[1];
                        if (term == c.term_count - 1) close();
                    }
                    block_barrier<7>();
                }
            }

            const Row r = shared.row;
            Out* const out = static_cast<Out*>(call.output.to) + row * call.output.stride;
            const int hot = c.one_hot ? column_of(c.targets, row, span.columns) : -8;
            const bool beside = paired && !mixed && (c.p || c.q_log_ratio || c.term_count);
            sweep(begin, count, [&](int i, int v) {
                if (!r.live) {
                    span.write(out, v, Quad{});
                    return;
                }
                const Quad x = get(held[i]);
                Quad of_t = {};
                if (mixed) of_t = get(held_t[i]);
                if (beside)
                    of_t = mix<Divergences>(c, r, row, student.scaled(span, v, x),
                                            teacher.scaled(span, v, get(held_t[i])));
                span.write(out, v, combine(c, r, student, span, row, hot, v, x, of_t));
            });
        }
    }
    // Others of the cluster may still be reading this block's sums.
    if (cluster.size > 1) cluster.template barrier<8>();
}

// -------------------------------------------------------------------------------------------------------------- launch

// How rows of a length are shared out.
struct Plan {
    int cluster = 1;  // blocks a row
    int capacity = 0;  // quads of a side in a block
    int threads = 0;
    std::size_t shared = 0;
    int clusters = 0;   // that the device runs at the same time
    bool whole = false;  // a row fits: it can have its gradient
};

using Kernel = void (*)(Fused);

// The smallest cluster that leaves room for a second block on each processor, else the smallest that holds a row at
// all, else tiles.
Plan make_plan(Kernel kernel, const Device& device, std::int64_t columns, int sides) {
    const int quads = static_cast<int>((columns + 3 + 3) / 4);
    constexpr int reserved = 1024;  // of each block, by the system
    const int half = device.shared_per_processor / 2 - reserved;
    Plan plan;
    for (const int room : {half < device.shared_per_block ? half : device.shared_per_block, device.shared_per_block})
        for (int cluster = 1; cluster <= (device.clusters ? 16 : 1); cluster *= 2) {
            plan.cluster = cluster;
            plan.capacity = quads > cluster ? (quads + cluster - 1) / cluster : 1;
            plan.threads = threads_for(plan.capacity, most_threads_for(sides == 2));
            plan.shared = shared_head + std::size_t(16) * sides * plan.capacity;
            plan.whole = true;
            if (plan.shared > static_cast<std::size_t>(room)) continue;
            plan.clusters = granted(kernel, device, cluster, plan.threads, plan.shared);
            if (plan.clusters > 0) return plan;
        }
    plan.cluster = 1;
    plan.capacity = static_cast<int>((half - shared_head) / 16 / sides);
    plan.threads = threads_for(plan.capacity, most_threads_for(sides == 2));
    plan.shared = shared_head + std::size_t(16) * sides * plan.capacity;
    plan.whole = false;
    plan.clusters = granted(kernel, device, 1, plan.threads, plan.shared);
    return plan;
}

// Plans ask the driver several questions: they are kept.
Plan plan_for(Kernel kernel, int device, std::int64_t columns, int sides) {
    static std::mutex lock;
    static std::map<std::tuple<Kernel, int, std::int64_t>, Plan> plans;
    const std::lock_guard<std::mutex> guard(lock);
    const auto [place, fresh] = plans.try_emplace({kernel, device, columns});
    if (fresh) place->second = make_plan(kernel, Device(device), columns, sides);
    return place->second;
}

template <class Out>
Kernel kernel_for(bool paired) {
    return paired ? row_kernel<Out, true> : row_kernel<Out, false>;
}

cudaError_t launch(Kernel kernel, const Plan& plan, const Call& call, void* stream) {
    if (plan.clusters < 1) return cudaErrorInvalidConfiguration;
    const auto clusters = static_cast<unsigned>(call.rows < plan.clusters ? call.rows : plan.clusters);
    const Launch launch(clusters * plan.cluster, plan.threads, plan.shared, stream, plan.cluster);
    const Fused fused = {call, plan.capacity};
    return LL_LAUNCH(&launch.config, kernel, fused);
}

bool acceptable(const Call& call) {
    return call.columns < most_columns && call.combination.term_count <= most_terms;
}

cudaError_t statistics_on(const Call& call, int device, void* stream) {
    const bool paired = call.teacher.z;
    const Kernel kernel = kernel_for<Nothing>(paired);
    return launch(kernel, plan_for(kernel, device, call.columns, paired ? 2 : 1), call, stream);
}

cudaError_t fused_on(const Call& call, int device, void* stream) {
    const bool paired = call.teacher.z;
    const Type type = call.output.type;
    const Kernel kernel = type == Type::float32    ? kernel_for<float>(paired)
                          : type == Type::bfloat16 ? kernel_for<__nv_bfloat16>(paired)
                                                   : kernel_for<__half>(paired);
    const Plan plan = plan_for(kernel, device, call.columns, paired ? 2 : 1);
    if (plan.whole) return launch(kernel, plan, call, stream);
    cudaError_t error = statistics_on(call, device, stream);
    if (error == cudaSuccess && call.combination.term_count) error = generic_pass(call, true, device, stream);
    return error == cudaSuccess ? gradient_pass(call, true, device, stream) : error;
}

}  // namespace
}  // namespace logitless::cuda

using namespace logitless::cuda;

extern "C" int logitless_cuda_statistics(const Call* call, int device, void* stream) {
    if (!acceptable(*call)) return cudaErrorInvalidValue;
    if (call->rows == 0) return cudaSuccess;
    const OnDevice current(device);
    return current.error() ? current.error() : statistics_on(*call, device, stream);
}

extern "C" int logitless_cuda_fused(const Call* call, int device, void* stream) {
    if (!acceptable(*call)) return cudaErrorInvalidValue;
    for (int i = 0; i < call->combination.term_count; ++i)
        if (call->combination.terms[i].functor >= logitless::Divergences::size) return cudaErrorInvalidValue;
    if (call->rows == 0) return cudaSuccess;
    const OnDevice current(device);
    return current.error() ? current.error() : fused_on(*call, device, stream);
}

extern "C" int logitless_cuda_probe(int device) {
    const OnDevice current(device);
    cudaFuncAttributes attributes;
    const cudaError_t error =
        current.error() ? current.error()
                        : cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel_for<Nothing>(false)));
    cudaGetLastError();
    return error;
}

extern "C" const char* logitless_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
