// Many tensors at once: two launches for as many as fit into the parameters of a kernel.
#include "../arithmetic/l1_norm.h"

#include "finish.h"
#include "passes.h"

namespace gradl1::cuda {
namespace {

constexpr int kMostPieces = 90;                        // 40 bytes each: with the rest, below the 4 KiB limit
constexpr std::int64_t kItem = 64 * kThreads * 4;      // elements that one block takes

struct Entry {
    const void* x;
    void* v;
    std::int64_t numel, first;  // first: number of its first block, and slot
    DType dtype;
};

struct Table {
    Entry entry[kMostPieces];
    int count;

    __device__ const Entry& of_block(std::int64_t block) const {
        int i = count - 1;
        while (entry[i].first > block) --i;
        return entry[i];
    }
};

std::int64_t blocks_of(std::int64_t numel) { return (numel + kItem - 1) / kItem; }

// Grid: all blocks of all tensors. `chosen` calls f(T()) with the type of an entry.
template <class F>
__device__ void chosen(DType dtype, const F& f) {
    switch (dtype) {
        case DType::float32: return f(float());
        case DType::float64: return f(double());
        case DType::float16: return f(Half());
        case DType::bfloat16: return f(BFloat16());
    }
}

// Applies a body to the elements of one block and adds up: packs where the memory is aligned, single elements at
// the end.
template <class Body, class T>
__device__ double item_sum(const Operands<Body, T>& o, std::int64_t first, std::int64_t last, bool wide) {
    using A = accumulator<T>;
    A k[1][Body::coefficients + 1], sum[1][Body::sums + 1] = {};
    if constexpr (Body::coefficients > 0) k[0][0] = o.k[0];
    const std::int64_t whole = wide ? first + (last - first) / kWidest<T> * kWidest<T> : first;
    for (std::int64_t i = first + threadIdx.x * kWidest<T>; i < whole; i += kThreads * kWidest<T>) {
        apply_pack<Body, T, kWidest<T>, 1>(o, i, k, sum);
    }
    for (std::int64_t i = whole + threadIdx.x; i < last; i += kThreads) apply_pack<Body, T, 1, 1>(o, i, k, sum);
    return sum[0][0];
}

template <class T>
__device__ bool wide_loads(const Entry& e) {
    return (reinterpret_cast<std::uintptr_t>(e.x) | reinterpret_cast<std::uintptr_t>(e.v)) % 16 == 0;
}

__global__ void __launch_bounds__(kThreads) l1_norm_kernel(Table table, double* slots) {
    const Entry& e = table.of_block(blockIdx.x);
    const std::int64_t first = (blockIdx.x - e.first) * kItem, end = first + kItem;
    const std::int64_t last = end < e.numel ? end : e.numel;
    // Phase 1: each thread adds its share of the block's elements.
    double sum = 0;
    chosen(e.dtype, [&](auto type) {
        using T = decltype(type);
        const T *x = static_cast<const T*>(e.x), *v = static_cast<const T*>(e.v);
        if (v) {
            sum = item_sum(Operands<L1DoubleBackward, T>{{v, x}, {}, nullptr, nullptr}, first, last, wide_loads<T>(e));
        } else {
            sum = item_sum(Operands<SumOfMagnitudes, T>{{x}, {}, nullptr, nullptr}, first, last, wide_loads<T>(e));
        }
    });
    // Phase 2: the threads of the block, in a fixed tree, to its slot.
    sum = block_sum(sum);
    if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) l1_norm_backward_kernel(Table table, const void* dy, bool wide) {
    const Entry& e = table.of_block(blockIdx.x);
    const std::int64_t first = (blockIdx.x - e.first) * kItem, end = first + kItem, i = &e - table.entry;
    const std::int64_t last = end < e.numel ? end : e.numel;
    // dx = dy * sign(x): one dy for each tensor.
    const double dy_i = wide ? static_cast<const double*>(dy)[i] : static_cast<const float*>(dy)[i];
    chosen(e.dtype, [&](auto type) {
        using T = decltype(type);
        const accumulator<T> k = static_cast<accumulator<T>>(dy_i);
        item_sum(Operands<L1Backward, T>{{static_cast<const T*>(e.x)}, {static_cast<T*>(e.v)}, &k, nullptr}, first, last,
                 wide_loads<T>(e));
    });
}

// A block for each tensor adds its slots.
__global__ void __launch_bounds__(kThreads)
    l1_norm_finish_kernel(Table table, const double* slots, std::int64_t blocks, void* norms, bool wide) {
    const int i = blockIdx.x;
    const std::int64_t end = i + 1 < table.count ? table.entry[i + 1].first : blocks;
    double sum = 0;
    for (std::int64_t slot = table.entry[i].first + threadIdx.x; slot < end; slot += kThreads) sum += slots[slot];
    sum = block_sum(sum);
    if (threadIdx.x) return;
    if (wide) {
        static_cast<double*>(norms)[i] = sum;
    } else {
        static_cast<float*>(norms)[i] = static_cast<float>(sum);
    }
}

// Calls f(table, first tensor, blocks) for each group of tensors that fits into one launch.
template <class F>
void for_each_table(const L1Norm& r, const F& f) {
    for (std::int64_t begin = 0; begin < r.count; begin += kMostPieces) {
        Table table{};
        std::int64_t blocks = 0;
        for (std::int64_t i = begin; i < r.count && i < begin + kMostPieces; ++i) {
            const Piece& p = r.pieces[i];
            table.entry[table.count++] = {p.x, p.v, p.numel, blocks, p.dtype};
            blocks += blocks_of(p.numel);
        }
        f(table, begin, blocks);
    }
}

template <class A>
A* from(A* values, std::int64_t i, bool wide) {
    return reinterpret_cast<A*>(reinterpret_cast<std::uintptr_t>(values) + static_cast<std::uintptr_t>(i) * (wide ? 8 : 4));
}

}  // namespace

void l1_norm(const L1Norm& r, Where where) {
    const OnDevice guard("l1_norm", where.first);
    double* slots = static_cast<double*>(r.scratch);
    for_each_table(r, [&](const Table& table, std::int64_t begin, std::int64_t blocks) {
        if (blocks) launch("l1_norm", l1_norm_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), where, table, slots);
        launch("l1_norm_finish", l1_norm_finish_kernel, dim3(static_cast<unsigned>(table.count)), dim3(kThreads), where, table,
               static_cast<const double*>(slots), blocks, from(r.norms, begin, r.wide), r.wide);
        slots += blocks;
    });
}

void l1_norm_backward(const L1Norm& r, Where where) {
    const OnDevice guard("l1_norm_backward", where.first);
    for_each_table(r, [&](const Table& table, std::int64_t begin, std::int64_t blocks) {
        if (!blocks) return;
        launch("l1_norm_backward", l1_norm_backward_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), where, table,
               from(r.dy, begin, r.wide), r.wide);
    });
}

std::int64_t l1_scratch_bytes(const Piece* pieces, std::int64_t count) {
    std::int64_t bytes = 0;
    for (std::int64_t i = 0; i < count; ++i) bytes += blocks_of(pieces[i].numel) * 8;
    return bytes;
}

}  // namespace gradl1::cuda
