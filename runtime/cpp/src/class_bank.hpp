// The class embeddings that an image graph answers with, read from its file without an engine.
#pragma once

#include <istream>
#include <string>
#include <vector>

namespace invariclip {

// Unit embeddings as the graph keeps them, [width, classes]: the initializer `class_bank`, or as float16
// `class_bank_float16`. Everything else is skipped and never held in memory. `path` is where the file lies: weights
// beside it are in `path.data`. Throws ArtifactError.
std::vector<float> read_class_bank(std::istream& file, const std::string& path, std::size_t width,
                                   std::size_t classes);

}  // namespace invariclip
