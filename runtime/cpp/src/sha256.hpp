// SHA-256 (FIPS 180-4) of a file.
#pragma once

#include <string>

namespace invariclip {

// In hexadecimal; read in pieces. Throws ArtifactError where the file cannot be read.
std::string sha256_file(const std::string& path);

}  // namespace invariclip
