#include "onnx_facts.hpp"

#include "protobuf.hpp"

namespace invariclip {
namespace {

using namespace protobuf;

constexpr std::uint64_t metadata_props = 14;      // of ModelProto
constexpr std::uint64_t max_entry = 64ULL << 20;  // more than any facts take

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
        const std::string bytes_of_entry = bytes.take(length);
        const auto [name, value] = entry_of(bytes_of_entry);
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
