// What an ONNX file says of itself, read from its protobuf without an engine and without the weights.
#pragma once

#include <istream>
#include <string>

namespace invariclip {

// The value of a key in `metadata_props`; of several the last counts, because facts are appended. Everything else, the
// graph with its weights too, is skipped and never held in memory. Throws ArtifactError where the file is no ONNX or
// has no such key.
std::string onnx_metadata(std::istream& file, const std::string& key);

}  // namespace invariclip
