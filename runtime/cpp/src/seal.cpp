#include "seal.hpp"

#include <algorithm>

#include "invariclip/invariclip.hpp"
#include "sha256.hpp"

namespace invariclip {
namespace {

constexpr std::string_view name = "file_sha256";
constexpr std::size_t within = 512;
constexpr std::size_t digits = 64;

bool is_hexadecimal(char sign) { return (sign >= '0' && sign <= '9') || (sign >= 'a' && sign <= 'f'); }

}  // namespace

std::size_t seal_of(std::string_view content) {
    const std::size_t begin = content.substr(0, within).find(name);
    if (begin == std::string_view::npos) {
        return begin;
    }
    // ": "  or, where the JSON stands in a text, \": \"
    const std::size_t place = content.find_first_not_of("\\\": ", begin + name.size());
    if (place == std::string_view::npos || content.size() - place < digits) {
        return std::string_view::npos;
    }
    const std::string_view digest = content.substr(place, digits);
    return std::all_of(digest.begin(), digest.end(), is_hexadecimal) ? place : std::string_view::npos;
}

std::string digest_under_seal(std::string_view content, std::size_t seal) {
    std::string blank(content);
    blank.replace(seal, digits, digits, '0');
    return sha256_of(blank);
}

void require_whole(std::string_view content) {
    const std::size_t seal = seal_of(content);
    if (seal == std::string_view::npos) {
        throw ArtifactError(
            "carries no digest of itself; it is damaged, or of an earlier version: make it again");
    }
    if (digest_under_seal(content, seal) != content.substr(seal, digits)) {
        throw ArtifactError("is damaged: its content is not what its own digest says; make it again");
    }
}

}  // namespace invariclip
