// SHA-256 (FIPS 180-4) of a file, or of bytes in memory, in hexadecimal. Processors that have instructions for it
// (SHA-NI, ARMv8's) take them, all others plain C++.
#pragma once

#include <string>
#include <string_view>

namespace invariclip {

// Read in pieces. Throws ArtifactError where the file cannot be read.
std::string sha256_file(const std::string& path);
std::string sha256_of(std::string_view bytes);
// The same in plain C++, which the others are held against.
std::string sha256_portable(std::string_view bytes);
// What the first two take on this processor: "sha-ni", "armv8" or "portable".
const char* sha256_instructions() noexcept;

}  // namespace invariclip
