// Walks tensors on the CPU: loads, applies a body, stores, adds up in a fixed order.
//
// A tensor is cut into chunks of pixels by its size alone. Each chunk leaves its sums in a slot of its
// own, and slots are added in order: the result depends neither on the number of threads nor on their
// timing. Inside a chunk a channel is summed pixel by pixel (channels last) or in 64 interleaved lanes
// (planes), never as the compiler likes: so every instruction set gives the same bits.
#pragma once

#include "../arithmetic/body.h"
#include "../requests.h"
#include "pool.h"

#if defined(__clang__)
#define GRADL1_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GRADL1_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace gradl1::host {
inline namespace GRADL1_ISA {

constexpr std::int64_t kChunk = 16384;      // elements that are worth handing to a thread
constexpr std::int64_t kMaxChunks = 256;    // bounds the slots
constexpr std::int64_t kTile = 256;         // channels summed together
constexpr std::int64_t kLanes = 64;         // interleaved sums of one channel
constexpr std::int64_t kFlush = 64;         // additions in the accumulation type before one to double
constexpr std::int64_t kSerial = 1 << 15;   // elements below which waking threads costs more than it gives

struct Chunks {
    bool rows;  // channels last: all channels of a range of pixels; else one channel
    std::int64_t length, count, items;

    explicit Chunks(const Layout& t) : rows(t.inner == 1 && t.channels > 1) {
        const std::int64_t pixels = t.pixels(), whole = rows ? kChunk / t.channels : kChunk;
        const std::int64_t least = (pixels + kMaxChunks - 1) / kMaxChunks;
        length = whole > least ? whole : least;
        if (length < 1) length = 1;
        count = (pixels + length - 1) / length;
        items = rows ? count : count * t.channels;
    }
};

template <class Body, class T, class A>
struct Pass {
    Layout layout;
    const T* in[Body::inputs + 1];
    T* out[Body::outputs + 1];
    const A* k;     // [coefficients][channels]
    double* slots;  // [chunks][sums][channels]
    const A* q = nullptr;  // [constants]

    // Elements offset .. offset + width; their sums go to sum[j * sum_stride + lane]. Step is the
    // distance of the coefficients of neighbours: 1 along channels, 0 inside one channel.
    template <int Step>
    GRADL1_FN void span(std::int64_t offset, std::int64_t width, const A* k0, A* sum, std::int64_t sum_stride) const {
        const std::int64_t channels = layout.channels;
        A constant[Body::constants + 1];
        for (int j = 0; j < Body::constants; ++j) constant[j] = q[j];
        GRADL1_INDEPENDENT
        for (std::int64_t i = 0; i < width; ++i) {
            A x[Body::inputs + 1], own[Body::values + 1], y[Body::outputs + 1], s[Body::sums + 1];
            for (int j = 0; j < Body::inputs; ++j) x[j] = static_cast<A>(widen(in[j][offset + i]));
            for (int j = 0; j < Body::coefficients; ++j) own[j] = k0[j * channels + Step * i];
            for (int j = 0; j < Body::constants; ++j) own[Body::coefficients + j] = constant[j];
            for (int j = 0; j < Body::sums; ++j) s[j] = sum[j * sum_stride + i];
            Body::apply(x, own, y, s);
            for (int j = 0; j < Body::sums; ++j) sum[j * sum_stride + i] = s[j];
            for (int j = 0; j < Body::outputs; ++j) {
                out[j][offset + i] = Narrow<T>::from(static_cast<accumulator<T>>(y[j]));
            }
        }
    }

    // What sum number j begins with.
    template <class V>
    static GRADL1_FN void fill(V* values, std::int64_t count, int j) {
        for (std::int64_t i = 0; i < count; ++i) values[i] = initial<Body, V>(j);
    }

    void row_chunk(std::int64_t chunk, std::int64_t first, std::int64_t last) const {
        const std::int64_t channels = layout.channels;
        A sum[(Body::sums + 1) * kTile];
        double* slot = Body::sums ? slots + chunk * Body::sums * channels : nullptr;
        for (int j = 0; j < Body::sums; ++j) fill(slot + j * channels, channels, j);
        for (std::int64_t top = first; top < last; top += kFlush) {
            const std::int64_t bottom = top + kFlush < last ? top + kFlush : last;
            for (std::int64_t c = 0; c < channels; c += kTile) {
                const std::int64_t width = channels - c < kTile ? channels - c : kTile;
                for (int j = 0; j < Body::sums; ++j) fill(sum + j * kTile, width, j);
                for (std::int64_t p = top; p < bottom; ++p) span<1>(p * channels + c, width, k + c, sum, kTile);
                if constexpr (Body::ends) {
                    for (std::int64_t i = 0; i < width; ++i) merge_ends(sum + i, kTile, slot + c + i, channels);
                } else {
                    for (int j = 0; j < Body::sums; ++j) {
                        for (std::int64_t i = 0; i < width; ++i) slot[j * channels + c + i] += sum[j * kTile + i];
                    }
                }
            }
        }
    }

    void plane_chunk(std::int64_t chunk, std::int64_t c, std::int64_t first, std::int64_t last) const {
        A sum[(Body::sums + 1) * kLanes];
        double total[Body::sums + 1];
        std::int64_t additions = 0;
        for (int j = 0; j < Body::sums; ++j) fill(total + j, 1, j), fill(sum + j * kLanes, kLanes, j);
        for (std::int64_t p = first; p < last;) {
            const std::int64_t plane = p / layout.inner, i = p - plane * layout.inner;
            std::int64_t width = layout.inner - i < last - p ? layout.inner - i : last - p;
            if (Body::sums && width > kLanes) width = kLanes;
            span<0>((plane * layout.channels + c) * layout.inner + i, width, k + c, sum, kLanes);
            p += width;
            if (++additions == kFlush || p == last) {
                additions = 0;
                if constexpr (Body::ends) {
                    for (std::int64_t l = 0; l < kLanes; ++l) merge_ends(sum + l, kLanes, total, 1);
                } else {
                    for (int j = 0; j < Body::sums; ++j) {
                        for (std::int64_t l = 0; l < kLanes; ++l) total[j] += sum[j * kLanes + l];
                    }
                }
                for (int j = 0; j < Body::sums; ++j) fill(sum + j * kLanes, kLanes, j);
            }
        }
        for (int j = 0; j < Body::sums; ++j) slots[(chunk * Body::sums + j) * layout.channels + c] = total[j];
    }

    static void item(void* context, std::int64_t i) {
        const Pass& pass = *static_cast<const Pass*>(context);
        const Chunks chunks(pass.layout);
        const std::int64_t chunk = chunks.rows ? i : i / pass.layout.channels, first = chunk * chunks.length;
        const std::int64_t pixels = pass.layout.pixels();
        const std::int64_t last = first + chunks.length < pixels ? first + chunks.length : pixels;
        if (chunks.rows) {
            pass.row_chunk(chunk, first, last);
        } else {
            pass.plane_chunk(chunk, i - chunk * pass.layout.channels, first, last);
        }
    }

    void run(int threads) {
        const int team = layout.numel() * (Body::inputs + Body::outputs) < kSerial ? 1 : threads;
        for_each(team, Chunks(layout).items, item, this);
    }

    // The ends from the slots of all channels.
    GRADL1_FN void ends(A* out) const {
        const std::int64_t count = Chunks(layout).count, channels = layout.channels;
        double total[kEndSums];
        for (int j = 0; j < kEndSums; ++j) total[j] = no_ends<double>(j);
        for (std::int64_t chunk = 0; chunk < count; ++chunk) {
            for (std::int64_t c = 0; c < channels; ++c) {
                merge_ends(slots + chunk * kEndSums * channels + c, channels, total, 1);
            }
        }
        write_ends(total, out);
    }

    // Adds the slots of channel c, in order.
    GRADL1_FN void total(std::int64_t c, double* sum) const {
        const std::int64_t count = Chunks(layout).count;
        for (int j = 0; j < Body::sums; ++j) {
            sum[j] = 0;
            for (std::int64_t chunk = 0; chunk < count; ++chunk) {
                sum[j] += slots[(chunk * Body::sums + j) * layout.channels + c];
            }
        }
    }
};

// Calls f(T()) with the type of the tag.
template <class F>
GRADL1_FN void with_type(DType dtype, const F& f) {
    switch (dtype) {
        case DType::float32: return f(float());
        case DType::float64: return f(double());
        case DType::float16: return f(Half());
        case DType::bfloat16: return f(BFloat16());
    }
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
