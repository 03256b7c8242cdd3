// SHA-256 (FIPS 180-4) of a file, or of bytes in memory.
#pragma once

#include <string>
#include <string_view>

namespace invariclip {

// In hexadecimal; read in pieces. Throws ArtifactError where the file cannot be read.
std::string sha256_file(const std::string& path);
std::string sha256_of(std::string_view bytes);

}  // namespace invariclip
