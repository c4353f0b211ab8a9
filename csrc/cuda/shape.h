// How a pass is cut into blocks. Sizes alone decide, so that sums are the same on every device.
#pragma once

#include <initializer_list>

#include "../requests.h"

namespace gradl1::cuda {

constexpr int kThreads = 256;
constexpr std::int64_t kBlocks = 4096;  // enough for the largest chip several times over

struct Shape {
    bool rows;                    // channels last: a block takes a tile of channels; else one channel
    int width;                    // elements of a pack, loaded at once
    int tile;                     // packs side by side in a block of rows: a power of two up to 32
    std::int64_t packs;           // rows: pixels; planes: packs of pixels of one channel
    std::int64_t columns, chunks, length;  // the grid, and the packs of a chunk

    Shape(const Layout& t, int widest, bool aligned) {
        rows = t.inner == 1 && t.channels > 1;
        const std::int64_t along = rows ? t.channels : t.inner;
        const bool flat = t.outer == 1 && t.channels == 1;
        width = aligned && (flat || along % widest == 0) ? widest : 1;
        const std::int64_t across = rows ? t.channels / width : 1;
        tile = 1;
        while (rows && tile < 32 && tile < across) tile *= 2;
        packs = rows ? t.outer : t.outer * (t.inner / width);
        columns = rows ? (across + tile - 1) / tile : t.channels;
        // A thread that takes fewer than four packs is not worth its share of the reduction.
        const std::int64_t least = 4 * kThreads / tile, wanted = (kBlocks + columns - 1) / columns;
        const std::int64_t useful = (packs + least - 1) / least;
        chunks = wanted < useful ? wanted : useful;
        if (chunks < 1) chunks = 1;
        length = (packs + chunks - 1) / chunks;
        if (length < 1) length = 1;
        chunks = (packs + length - 1) / length;
        if (chunks < 1) chunks = 1;  // a flat tensor smaller than a pack: its tail alone
    }
};

// The most slots that any pass over this layout needs.
inline std::int64_t most_chunks(const Layout& t) {
    std::int64_t most = 1;
    for (int widest : {1, 2, 4, 8}) {
        const Shape shape(t, widest, true);
        most = shape.chunks > most ? shape.chunks : most;
    }
    return most;
}

// Scratch of any pass, in doubles: the slots, the coefficients, one value for each channel, the constants.
constexpr std::int64_t kMostSums = kDoubleBackwardSums;

inline std::int64_t coefficients_at(const Layout& t) { return most_chunks(t) * kMostSums * t.channels; }
inline std::int64_t per_channel_at(const Layout& t) { return coefficients_at(t) + kDoubleCoefficients * t.channels; }
inline std::int64_t constants_at(const Layout& t) { return per_channel_at(t) + t.channels; }
inline std::int64_t scratch_end(const Layout& t) { return constants_at(t) + kQuantizedConstants; }

}  // namespace gradl1::cuda
