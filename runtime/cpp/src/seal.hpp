// The digest that a file of ours carries of itself, as Python's `invariclip.records` writes it.
#pragma once

#include <string>
#include <string_view>

namespace invariclip {

// Where the 64 hexadecimal digits stand; npos where there are none.
std::size_t seal_of(std::string_view content);

// The digest of the content, taken with zeros in place of those digits.
std::string digest_under_seal(std::string_view content, std::size_t seal);

// Throws ArtifactError where the content carries no digest, or is not what its digest says.
void require_whole(std::string_view content);

}  // namespace invariclip
