// Many tensors in one parallel region: the work items of all of them are numbered through.
#include "../arithmetic/l1_norm.h"

#include "passes.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {
namespace {

struct Item {
    const Piece* piece;
    std::int64_t chunk;
};

template <class Body, class T>
double chunk_sum(const Piece& piece, std::int64_t chunk) {
    double slots[kMaxChunks + 1];
    const T *x = static_cast<const T*>(piece.x), *v = static_cast<const T*>(piece.v);
    Pass<Body, T, accumulator<T>> pass{flat(piece.numel), {v ? v : x, x}, {}, nullptr, slots};
    pass.item(&pass, chunk);
    return slots[chunk];
}

// dx of one chunk, written to v.
template <class T>
void chunk_gradient(const L1Norm& r, const Item& item) {
    using A = accumulator<T>;
    const std::int64_t i = item.piece - r.pieces;
    const A k[1] = {static_cast<A>(r.wide ? static_cast<const double*>(r.dy)[i] : static_cast<const float*>(r.dy)[i])};
    const T* x = static_cast<const T*>(item.piece->x);
    Pass<L1Backward, T, A> pass{flat(item.piece->numel), {x}, {static_cast<T*>(item.piece->v)}, k, nullptr};
    pass.item(&pass, item.chunk);
}

Item find(const L1Norm& r, std::int64_t index) {
    for (std::int64_t i = 0;; ++i) {
        const std::int64_t count = Chunks(flat(r.pieces[i].numel)).count;
        if (index < count) return {r.pieces + i, index};
        index -= count;
    }
}

void item(void* context, std::int64_t index) {
    const L1Norm& r = *static_cast<const L1Norm*>(context);
    const Item found = find(r, index);
    with_type(found.piece->dtype, [&](auto type) {
        using T = decltype(type);
        const double sum = found.piece->v ? chunk_sum<L1DoubleBackward, T>(*found.piece, found.chunk)
                                          : chunk_sum<SumOfMagnitudes, T>(*found.piece, found.chunk);
        static_cast<double*>(r.scratch)[index] = sum;
    });
}

void gradient_item(void* context, std::int64_t index) {
    const L1Norm& r = *static_cast<const L1Norm*>(context);
    const Item found = find(r, index);
    with_type(found.piece->dtype, [&](auto type) { chunk_gradient<decltype(type)>(r, found); });
}

// Numbers the items of all tensors through and shares them among the threads.
void for_each_chunk(L1Norm& r, int threads, void (*task)(void*, std::int64_t)) {
    std::int64_t items = 0, elements = 0;
    for (std::int64_t i = 0; i < r.count; ++i) {
        items += Chunks(flat(r.pieces[i].numel)).count;
        elements += r.pieces[i].numel;
    }
    for_each(elements < kSerial ? 1 : threads, items, task, &r);
}

}  // namespace

void l1_norm_backward(const L1Norm& request, int threads) {
    L1Norm r = request;
    for_each_chunk(r, threads, gradient_item);
}

void l1_norm(const L1Norm& request, int threads) {
    L1Norm r = request;
    std::int64_t slot = 0;
    for_each_chunk(r, threads, item);
    for (std::int64_t i = 0; i < r.count; ++i) {
        double sum = 0;
        const std::int64_t end = slot + Chunks(flat(r.pieces[i].numel)).count;
        while (slot < end) sum += static_cast<const double*>(r.scratch)[slot++];
        if (r.wide) {
            static_cast<double*>(r.norms)[i] = sum;
        } else {
            static_cast<float*>(r.norms)[i] = static_cast<float>(sum);
        }
    }
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
