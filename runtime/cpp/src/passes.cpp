#include "passes.hpp"

#include <algorithm>
#include <cstring>

// One binary for old and new processors: the inner loops are compiled twice, and each call takes those that the
// processor has. `target_clones` would do the same, but picks before main, where the code of sanitizers is not ready.
// INVARICLIP_PLAIN leaves the second set out.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(INVARICLIP_PLAIN)
#define INVARICLIP_AVX2 __attribute__((target("avx2")))
#endif

#if defined(__GNUC__)
#define INVARICLIP_INLINE inline __attribute__((always_inline))
#else
#define INVARICLIP_INLINE inline
#endif

namespace invariclip {
namespace {

constexpr std::int32_t half = 1 << (precision - 1);

inline std::uint8_t clipped(std::int32_t sum) {
    return static_cast<std::uint8_t>(std::clamp(sum >> precision, 0, 255));
}

template <std::size_t channels>
constexpr std::size_t lanes = channels * rows_at_once<channels>;

// Every kept output of all lanes; block: [taps from axis.first on, width], out: [kept, width].
template <std::size_t width>
INVARICLIP_INLINE void sum_block(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    for (std::size_t place = 0; place < axis.kept; ++place, out += width) {
        const std::int32_t* weights = axis.of(place);
        const std::uint8_t* from = block + (axis.begin[place] - axis.first) * width;
        const std::size_t taps = axis.taps[place];
        std::int32_t sums[width];
        for (std::size_t lane = 0; lane < width; ++lane) {
            sums[lane] = half;
        }
        for (std::size_t tap = 0; tap < taps; ++tap) {
            for (std::size_t lane = 0; lane < width; ++lane) {
                sums[lane] += weights[tap] * from[tap * width + lane];
            }
        }
        for (std::size_t lane = 0; lane < width; ++lane) {
            out[lane] = clipped(sums[lane]);
        }
    }
}

template <std::size_t channels>
void sum_lanes(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    sum_block<lanes<channels>>(block, axis, out);
}

#ifdef INVARICLIP_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0; }

template <std::size_t channels>
INVARICLIP_AVX2 void sum_lanes_avx2(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    sum_block<lanes<channels>>(block, axis, out);
}
#endif

INVARICLIP_INLINE void sum_taps(const std::uint8_t* rows, std::size_t apart, std::size_t bytes,
                                const std::int32_t* weights, std::size_t taps, std::int32_t* sums, std::uint8_t* out) {
    for (std::size_t place = 0; place < bytes; ++place) {
        sums[place] = half;
    }
    for (std::size_t tap = 0; tap < taps; ++tap) {
        const std::uint8_t* row = rows + tap * apart;
        const std::int32_t weight = weights[tap];
        for (std::size_t place = 0; place < bytes; ++place) {
            sums[place] += weight * row[place];
        }
    }
    for (std::size_t place = 0; place < bytes; ++place) {
        out[place] = clipped(sums[place]);
    }
}

#ifdef INVARICLIP_AVX2
INVARICLIP_AVX2 void sum_taps_avx2(const std::uint8_t* rows, std::size_t apart, std::size_t bytes,
                                   const std::int32_t* weights, std::size_t taps, std::int32_t* sums,
                                   std::uint8_t* out) {
    sum_taps(rows, apart, bytes, weights, taps, sums, out);
}
#endif

// round(a * b / 255), as Pillow rounds it
inline std::uint8_t share(unsigned value, unsigned alpha) {
    const unsigned product = value * alpha + 128;
    return static_cast<std::uint8_t>((product + (product >> 8)) >> 8);
}

}  // namespace

void sum_rows(const std::uint8_t* rows, std::size_t apart, std::size_t bytes, const std::int32_t* weights,
              std::size_t taps, std::int32_t* sums, std::uint8_t* out) {
#ifdef INVARICLIP_AVX2
    if (has_avx2()) {
        sum_taps_avx2(rows, apart, bytes, weights, taps, sums, out);
        return;
    }
#endif
    sum_taps(rows, apart, bytes, weights, taps, sums, out);
}

// A run of columns at a time, row by row: rows whose distance is a power of two would otherwise push one another out of
// the cache.
template <std::size_t channels>
void interleave(const std::uint8_t* const* rows, std::size_t columns, std::uint8_t* block) {
    constexpr std::size_t together = rows_at_once<channels>;
    constexpr std::size_t run = 64;
    for (std::size_t begin = 0; begin < columns; begin += run) {
        const std::size_t end = std::min(begin + run, columns);
        for (std::size_t row = 0; row < together; ++row) {
            std::uint8_t* to = block + (begin * together + row) * channels;
            const std::uint8_t* from = rows[row] + begin * channels;
            std::size_t column = begin;
            if (channels == 3 && row + 1 < together) {
                // four bytes are copied faster than three; the next row writes over the fourth
                for (; column + 1 < end; ++column, from += channels, to += lanes<channels>) {
                    std::memcpy(to, from, 4);
                }
            }
            for (; column < end; ++column, from += channels, to += lanes<channels>) {
                std::memcpy(to, from, channels);
            }
        }
    }
}

template void interleave<1>(const std::uint8_t* const*, std::size_t, std::uint8_t*);
template void interleave<3>(const std::uint8_t* const*, std::size_t, std::uint8_t*);
template void interleave<4>(const std::uint8_t* const*, std::size_t, std::uint8_t*);

template <std::size_t channels>
void sum_columns(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
#ifdef INVARICLIP_AVX2
    if (has_avx2()) {
        sum_lanes_avx2<channels>(block, axis, out);
        return;
    }
#endif
    sum_lanes<channels>(block, axis, out);
}

template void sum_columns<1>(const std::uint8_t*, const Axis&, std::uint8_t*);
template void sum_columns<3>(const std::uint8_t*, const Axis&, std::uint8_t*);
template void sum_columns<4>(const std::uint8_t*, const Axis&, std::uint8_t*);

void premultiply(const std::uint8_t* row, std::size_t columns, std::uint8_t* out) {
    for (std::size_t column = 0; column < columns; ++column, row += 4, out += 4) {
        out[0] = share(row[0], row[3]);
        out[1] = share(row[1], row[3]);
        out[2] = share(row[2], row[3]);
        out[3] = row[3];
    }
}

void finish(const std::uint8_t* row, std::size_t columns, Order order, bool premultiplied, std::uint8_t* out) {
    const std::size_t channels = channels_of(order);
    const bool turned = order == Order::bgr || order == Order::bgra;
    if (order == Order::rgb) {
        std::memcpy(out, row, columns * 3);
        return;
    }
    for (std::size_t column = 0; column < columns; ++column, row += channels, out += 3) {
        if (order == Order::grey) {
            out[0] = out[1] = out[2] = row[0];
            continue;
        }
        std::uint8_t first = row[0];
        std::uint8_t second = row[1];
        std::uint8_t third = row[2];
        if (premultiplied && row[3] != 0 && row[3] != 255) {
            first = static_cast<std::uint8_t>(std::min(255U * first / row[3], 255U));
            second = static_cast<std::uint8_t>(std::min(255U * second / row[3], 255U));
            third = static_cast<std::uint8_t>(std::min(255U * third / row[3], 255U));
        }
        out[0] = turned ? third : first;
        out[1] = second;
        out[2] = turned ? first : third;
    }
}

}  // namespace invariclip
