// What an artifact says of itself: its folder's manifest, or one image graph alone.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "invariclip/invariclip.hpp"
#include "tokenizer.hpp"

namespace invariclip {

enum class Compute { float32, bfloat16, float16 };

struct Facts {
    std::string space_id;
    std::vector<std::string> classes;
    PixelSpec pixels;
    std::size_t width = 0;  // of the embeddings
    bool learned = false;   // templates that give an uncertainty
    std::optional<double> abstain_above;
    double logit_scale = 1;              // τ, already exponentiated
    std::optional<double> logit_bias;    // of models that answer with a sigmoid for each class
    std::optional<std::string> site;     // the name of one that its graphs are adapted to
    std::vector<std::string> templates;  // prompts that its classes were embedded with
};

// One graph, ready to be opened.
struct Graph {
    std::string path;
    std::string variant;  // empty of a file opened alone
    std::optional<std::string> sha256;
    std::optional<std::string> data_sha256;
    Compute compute = Compute::float32;
    bool resizes = false;                       // by ONNX's Resize, which only ONNX Runtime computes as the export does
    std::vector<std::string> proved;            // engines that it kept the contract in; none are known of a file alone
    std::map<std::string, std::string> missed;  // engines that it broke the contract in, and how
};

// The text side of a folder: looked for at the first text, because a device that asks for none may lack its files.
struct TextSide {
    TextSpec spec;
    Graph graph;
    bool dynamic = false;   // takes rows that are cut to what the longest of them needs
    std::string tokenizer;  // a file
    std::string tokenizer_sha256;
};

struct Artifact {
    Facts facts;
    Graph graph;
    std::string manifest;  // its content; empty of a file opened alone
};

// From a manifest or the facts of an ONNX file, as JSON. Throws ArtifactError.
Facts read_facts(std::string_view text);
Artifact read_manifest(const std::string& folder, std::string_view text, const std::string& variant);

// Throws ArtifactError, InputError where there are no texts.
TextSide read_text_side(const std::string& folder, std::string_view manifest, const std::string& variant);

// Opens a folder or a file. Digests are not yet checked. Throws ArtifactError, InputError.
Artifact open_artifact(const std::string& path, const std::string& variant);

// Makes sure that the graph is the exported one. Throws ArtifactError.
void require_unchanged(const Graph& graph);
// The content of a tokenizer's file, held against its digest where that is asked for. Throws ArtifactError.
std::string read_tokenizer(const TextSide& text, bool verify);

}  // namespace invariclip
