// Protobuf's wire format, as far as it is needed to read ONNX files.
#pragma once

#include <cstdint>
#include <istream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "invariclip/invariclip.hpp"

namespace invariclip::protobuf {

[[noreturn]] inline void refuse(const char* what) { throw ArtifactError(std::string("is no ONNX file: ") + what); }

// `Bytes` gives one byte at a time and nothing at its end.
template <typename Bytes>
std::optional<std::uint64_t> varint(Bytes& bytes, bool may_end) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 70; shift += 7) {
        const std::optional<std::uint8_t> byte = bytes.next();
        if (!byte) {
            if (may_end && shift == 0) {
                return std::nullopt;
            }
            refuse("it ends inside a number");
        }
        value |= shift < 64 ? std::uint64_t{*byte & 0x7FU} << shift : 0;
        if ((*byte & 0x80U) == 0) {
            return value;
        }
    }
    refuse("a number has more than ten bytes");
}

template <typename Bytes>
void skip_field(Bytes& bytes, unsigned kind) {
    switch (kind) {
        case 0: varint(bytes, false); return;
        case 1: bytes.skip(8); return;
        case 2: bytes.skip(*varint(bytes, false)); return;
        case 5: bytes.skip(4); return;
        default: refuse("a field is of an unknown kind");
    }
}

// Bytes of a file, read where the file stands.
class FileBytes {
  public:
    // All of the file, from its beginning.
    explicit FileBytes(std::istream& file) : file_(file) {
        file_.seekg(0, std::ios::end);
        const auto end = static_cast<std::int64_t>(file_.tellg());
        left_ = end < 0 ? 0 : static_cast<std::uint64_t>(end);
        file_.seekg(0);
    }
    // The next `count` bytes of `outer`, which goes on behind them; they have to be read to their end.
    FileBytes(FileBytes& outer, std::uint64_t count) : file_(outer.file_), left_(count) { outer.require(count); }

    std::optional<std::uint8_t> next() {
        if (left_ == 0) {
            return std::nullopt;
        }
        --left_;
        return static_cast<std::uint8_t>(file_.get());
    }
    void skip(std::uint64_t count) {
        require(count);
        file_.seekg(static_cast<std::streamoff>(count), std::ios::cur);
    }
    // Where the next byte stands in the file.
    std::streamoff place() { return file_.tellg(); }
    std::string take(std::uint64_t count) {
        require(count);
        std::string taken(static_cast<std::size_t>(count), '\0');
        file_.read(taken.data(), static_cast<std::streamsize>(count));
        if (!file_) {
            refuse("it cannot be read");
        }
        return taken;
    }

  private:
    void require(std::uint64_t count) {
        if (count > left_) {
            refuse("a field is longer than what is left of it");
        }
        left_ -= count;
    }
    std::istream& file_;
    std::uint64_t left_ = 0;
};

// Bytes in memory.
class MemoryBytes {
  public:
    explicit MemoryBytes(std::string_view bytes) : rest_(bytes) {}
    std::optional<std::uint8_t> next() {
        if (rest_.empty()) {
            return std::nullopt;
        }
        const auto byte = static_cast<std::uint8_t>(rest_.front());
        rest_.remove_prefix(1);
        return byte;
    }
    void skip(std::uint64_t count) { take(count); }
    std::string_view take(std::uint64_t count) {
        if (count > rest_.size()) {
            refuse("a field is longer than what is left of it");
        }
        const std::string_view taken = rest_.substr(0, static_cast<std::size_t>(count));
        rest_.remove_prefix(static_cast<std::size_t>(count));
        return taken;
    }

  private:
    std::string_view rest_;
};

// What the bytes of a StringStringEntryProto say: a key and its value.
inline std::pair<std::string_view, std::string_view> entry_of(std::string_view bytes) {
    MemoryBytes inside(bytes);
    std::pair<std::string_view, std::string_view> entry;
    while (const std::optional<std::uint64_t> field = varint(inside, true)) {
        if (*field == (1 << 3 | 2)) {
            entry.first = inside.take(*varint(inside, false));
        } else if (*field == (2 << 3 | 2)) {
            entry.second = inside.take(*varint(inside, false));
        } else {
            skip_field(inside, static_cast<unsigned>(*field & 7U));
        }
    }
    return entry;
}

}  // namespace invariclip::protobuf
