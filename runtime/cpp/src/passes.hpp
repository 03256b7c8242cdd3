// The two passes of a resize, and what stands before and behind them.
#pragma once

#include "plan.hpp"

namespace invariclip {

// Rows that go through the first pass together: as many as make whole vectors of 32 channels, which is what a compiler
// needs to use all of a register.
template <std::size_t channels>
constexpr std::size_t rows_at_once = channels == 4 ? 8 : 32;

// Columns of `rows_at_once` rows, side by side: `block` is [columns, rows, channels].
template <std::size_t channels>
void interleave(const std::uint8_t* const* rows, std::size_t columns, std::uint8_t* block);

// Every kept output of a block's rows; block: from axis.first on, out: [kept, rows, channels].
template <std::size_t channels>
void sum_columns(const std::uint8_t* block, const Axis& axis, std::uint8_t* out);

// One row of the second pass: rows `apart` bytes from one another, weighted and added. `sums` is room for `bytes`
// numbers.
void sum_rows(const std::uint8_t* rows, std::size_t apart, std::size_t bytes, const std::int32_t* weights,
              std::size_t taps, std::int32_t* sums, std::uint8_t* out);

// RGBA, or BGRA, with its colours multiplied by alpha.
void premultiply(const std::uint8_t* row, std::size_t columns, std::uint8_t* out);

// A row as it was resized, to RGB; `premultiplied`: its colours are to be divided by alpha again.
void finish(const std::uint8_t* row, std::size_t columns, Order order, bool premultiplied, std::uint8_t* out);

}  // namespace invariclip
