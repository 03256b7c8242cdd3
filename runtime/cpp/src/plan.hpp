// What a resize and a crop of one size of image come to: which inputs every kept output is a sum of, and how much of
// each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "invariclip/invariclip.hpp"

namespace invariclip {

// Weights are whole numbers of this many binary places, as Pillow's are.
constexpr int precision = 32 - 8 - 2;

// One direction of a resize: what every kept output is a sum of.
struct Axis {
    std::size_t size = 0;     // of the input
    std::size_t resized = 0;  // of the whole output
    std::size_t skipped = 0;  // outputs that the crop cuts away in front
    std::size_t kept = 0;     // outputs that are computed
    std::size_t border = 0;   // padding in front
    std::size_t first = 0;    // the inputs that any kept output needs: [first, last)
    std::size_t last = 0;
    std::size_t most = 0;  // taps to an output, as stored
    std::vector<std::size_t> begin;
    std::vector<std::size_t> taps;
    std::vector<std::int32_t> weights;  // [kept, most]

    [[nodiscard]] bool same() const noexcept { return size == resized; }
    [[nodiscard]] const std::int32_t* of(std::size_t place) const noexcept { return weights.data() + place * most; }
};

struct Plan {
    std::size_t width = 0;
    std::size_t height = 0;
    std::uint64_t used = 0;  // when; the least recently used goes first
    Axis across;
    Axis down;
    bool columns_first = false;

    [[nodiscard]] bool same() const noexcept { return across.same() && down.same(); }
    [[nodiscard]] std::size_t weights() const noexcept { return across.weights.size() + down.weights.size(); }
};

// Throws InputError where the image would grow, or its weights, beyond all bounds.
Plan plan_of(const PixelSpec& spec, std::size_t width, std::size_t height);

}  // namespace invariclip
