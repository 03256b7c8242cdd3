#include "onnx_facts.hpp"

#include <cstdint>
#include <optional>
#include <string_view>

#include "invariclip/invariclip.hpp"

namespace invariclip {
namespace {

constexpr std::uint64_t metadata_props = 14;      // of ModelProto
constexpr std::uint64_t max_entry = 64ULL << 20;  // more than any facts take

[[noreturn]] void refuse(const char* what) { throw ArtifactError(std::string("is no ONNX file: ") + what); }

// Protobuf's wire format, as far as it is needed. `Bytes` gives one byte at a time and nothing at its end.
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

class FileBytes {
  public:
    explicit FileBytes(std::istream& file) : file_(file) {
        file_.seekg(0, std::ios::end);
        const auto end = static_cast<std::int64_t>(file_.tellg());
        left_ = end < 0 ? 0 : static_cast<std::uint64_t>(end);
        file_.seekg(0);
    }
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

}  // namespace

std::string onnx_metadata(std::istream& file, const std::string& key) {
    FileBytes bytes(file);
    std::optional<std::string> found;
    while (const std::optional<std::uint64_t> tag = varint(bytes, true)) {
        if (*tag != (metadata_props << 3 | 2)) {
            skip_field(bytes, static_cast<unsigned>(*tag & 7U));
            continue;
        }
        const std::uint64_t length = *varint(bytes, false);
        if (length > max_entry) {
            refuse("an entry of metadata_props is larger than any facts");
        }
        const std::string entry = bytes.take(length);
        MemoryBytes inside(entry);
        std::string_view name;
        std::string_view value;
        while (const std::optional<std::uint64_t> field = varint(inside, true)) {
            if (*field == (1 << 3 | 2)) {
                name = inside.take(*varint(inside, false));
            } else if (*field == (2 << 3 | 2)) {
                value = inside.take(*varint(inside, false));
            } else {
                skip_field(inside, static_cast<unsigned>(*field & 7U));
            }
        }
        if (name == key) {
            found = std::string(value);
        }
    }
    if (!found) {
        throw ArtifactError("carries no facts of invariclip in its metadata_props; export it with `invariclip export`");
    }
    return *found;
}

}  // namespace invariclip
