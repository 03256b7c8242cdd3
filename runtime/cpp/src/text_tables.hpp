// What Python's str.lower, str.split, unicodedata, html.unescape and ftfy know of characters; written by
// `python -m invariclip.bench.cpp.tables`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace invariclip::tables {

// Rows in a fixed place, sorted by their first member.
template <typename Row>
class Table {
  public:
    template <std::size_t count>
    constexpr explicit Table(const Row (&rows)[count]) : first_(rows), count_(count) {}
    [[nodiscard]] const Row* begin() const noexcept { return first_; }
    [[nodiscard]] const Row* end() const noexcept { return first_ + count_; }

  private:
    const Row* first_;
    std::size_t count_;
};

struct Range {
    char32_t first;
    char32_t last;
};
struct Lower {
    char32_t first;
    char32_t last;
    char32_t step;
    std::int32_t difference;
};
struct Class {
    char32_t first;
    char32_t last;
    int kind;
};
struct Decomposition {
    char32_t code;
    char32_t first;
    char32_t second;  // 0: there is none
    int composes;     // whether the two become it again
};
struct Pair {
    char32_t code;
    char32_t to;
};
struct Text {
    char32_t code;
    const char* to;
};
struct Entity {
    const char* name;
    const char* to;
};
constexpr std::size_t bad_length = 7;
// Places in bad_sets, one for each character; -1 is the begin of the text, -2 stands behind the end of the sequence
struct Sequence {
    std::array<int, bad_length> sets;
};

extern const Table<Range> spaces;     // str.isspace
extern const Table<Range> digits;     // of any script
extern const Table<Range> cased;      // before a sigma, they make it final
extern const Table<Range> ignorable;  // skipped where a sigma looks for them
extern const Table<Lower> lower;
extern const Table<Class> combining;
extern const Table<Decomposition> decompositions;
extern const Table<Text> widths;
extern const Table<Text> ligatures;
extern const Table<Range> removed;  // control characters that ftfy drops
extern const Table<Range> bad_ranges;
extern const Table<Range> bad_sets;  // from and to which of bad_ranges
extern const Table<Sequence> bad_sequences;
extern const Table<Entity> entities;           // of HTML 5, some without a semicolon
extern const Table<Entity> shouted_entities;   // that ftfy knows in capitals
extern const Table<Pair> replaced_references;  // numbers that HTML 5 takes for others
extern const Table<Range> dropped_references;  // numbers that are nothing

}  // namespace invariclip::tables
