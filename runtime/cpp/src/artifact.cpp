#include "artifact.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "json.hpp"
#include "onnx_facts.hpp"
#include "seal.hpp"
#include "sha256.hpp"

namespace invariclip {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t schema_version = 3;
constexpr std::size_t max_manifest_bytes = std::size_t{64} << 20;
constexpr std::size_t max_width = std::size_t{1} << 20;
constexpr std::size_t max_file_bytes = std::size_t{1} << 53;
constexpr const char* manifest_name = "manifest.json";
constexpr const char* metadata_key = "invariclip";
constexpr const char* safe_variant = "float32";

PixelSpec read_pixels(const json::Value& plain) {
    PixelSpec spec;
    const json::Array& size = plain.at("image_size").array("image_size");
    if (size.size() != 2) {
        throw ArtifactError("image_size is not a height and a width");
    }
    spec.height = size[0].count("image_size", 1, 4096);
    spec.width = size[1].count("image_size", 1, 4096);
    const std::string& interpolation = plain.at("interpolation").text("interpolation");
    const std::string& mode = plain.at("resize_mode").text("resize_mode");
    if (interpolation != "bicubic" && interpolation != "bilinear") {
        throw ArtifactError("interpolation '" + interpolation + "' is not known; available: bicubic, bilinear");
    }
    if (mode != "shortest" && mode != "longest" && mode != "squash") {
        throw ArtifactError("resize_mode '" + mode + "' is not known; available: shortest, longest, squash");
    }
    spec.interpolation = interpolation == "bicubic" ? Interpolation::bicubic : Interpolation::bilinear;
    spec.resize_mode = mode == "shortest"  ? ResizeMode::shortest
                       : mode == "longest" ? ResizeMode::longest
                                           : ResizeMode::squash;
    spec.fill_color = static_cast<std::uint8_t>(plain.at("fill_color").count("fill_color", 0, 255));
    return spec;
}

Facts facts_of(const json::Value& plain) {
    const std::size_t version = plain.at("schema_version").count("schema_version", 0, 1'000'000);
    if (version != schema_version) {
        throw ArtifactError("schema_version " + std::to_string(version) + " is not known; this version reads " +
                            std::to_string(schema_version) + ": export again");
    }
    Facts facts;
    facts.space_id = plain.at("space_id").text("space_id");
    facts.pixels = read_pixels(plain.at("pixels"));
    for (const json::Value& name : plain.at("classes").array("classes")) {
        facts.classes.push_back(name.text("a class"));
    }
    facts.width = plain.has("projection") ? plain.at("projection").at("rank").count("rank", 1, max_width)
                                          : plain.at("model").at("embed_dim").count("embed_dim", 1, max_width);
    facts.logit_scale = plain.at("model").at("logit_scale").number("logit_scale");
    if (plain.at("model").has("logit_bias")) {
        facts.logit_bias = plain.at("model").at("logit_bias").number("logit_bias");
    }
    if (plain.has("site")) {
        facts.site = plain.at("site").at("name").text("a site's name");
    }
    if (plain.has("templates")) {
        for (const json::Value& one : plain.at("templates").array("templates")) {
            facts.templates.push_back(one.text("a template"));
        }
    }
    facts.learned = plain.has("cdc");
    if (facts.learned && plain.at("cdc").has("abstain_above")) {
        const double limit = plain.at("cdc").at("abstain_above").number("abstain_above");
        if (!(limit >= 0 && limit <= 1)) {
            throw ArtifactError("abstain_above is not from 0 to 1");
        }
        facts.abstain_above = limit;
    }
    return facts;
}

// A file's name inside the folder: nothing an artifact names lies outside of it.
void require_bare(const std::string& name) {
    const bool leaves = name.find_first_of(std::string("/\\\0", 3)) != std::string::npos;
    if (leaves || name.empty() || name == "." || name == ".." || name == manifest_name) {
        throw ArtifactError(json::quoted(name) + " is not the name of a file in the artifact's folder");
    }
}

Compute compute_of(const std::string& name) {
    if (name != "float32" && name != "bfloat16" && name != "float16") {
        throw ArtifactError("compute '" + name + "' is not known; it is one of: float32, bfloat16, float16");
    }
    return name == "float32" ? Compute::float32 : name == "bfloat16" ? Compute::bfloat16 : Compute::float16;
}

std::string listed(const json::Object& members) {
    std::string names;
    for (const auto& member : members) {
        names += (names.empty() ? "" : ", ") + member.first;
    }
    return names.empty() ? "none" : names;
}

// A file of the folder that the manifest names, there and of the size that it says.
fs::path file_of(const std::string& folder, const json::Value& plain) {
    const std::string& name = plain.at("path").text("path");
    require_bare(name);
    const fs::path root = fs::weakly_canonical(fs::path(folder));
    const fs::path path = fs::weakly_canonical(root / fs::u8path(name));
    if (path.parent_path() != root) {
        throw ArtifactError("the manifest names " + json::quoted(name) + ", which leaves the artifact's folder");
    }
    const std::size_t bytes = plain.at("size_bytes").count("size_bytes", 0, max_file_bytes);
    if (!fs::is_regular_file(path)) {
        throw ArtifactError(name + " is missing; export again");
    }
    if (fs::file_size(path) != bytes) {
        throw ArtifactError(name + " is not the file that was exported (its size differs); export again");
    }
    return path;
}

// `which`: image or text.
Graph graph_of(const std::string& folder, const json::Value& plain, const std::string& wanted, const char* which) {
    const json::Object& variants = plain.at("variants").object("variants");
    const auto found = variants.find(wanted.empty() ? safe_variant : wanted);
    if (found == variants.end()) {
        throw ArtifactError("no variant '" + (wanted.empty() ? safe_variant : wanted) +
                            "'; available: " + listed(variants));
    }
    const json::Value& variant = found->second;
    const json::Value& file = variant.at(which);
    Graph graph;
    graph.variant = found->first;
    graph.sha256 = file.at("sha256").text("sha256");
    if (file.has("data_sha256")) {
        graph.data_sha256 = file.at("data_sha256").text("data_sha256");
    }
    const bool text = std::string_view(which) == "text";
    const char* compute = text ? "text_compute" : "compute";
    graph.compute = variant.has(compute) ? compute_of(variant.at(compute).text(compute)) : Compute::float32;
    const std::string front = variant.has("front") ? variant.at("front").text("front") : "host";
    if (front != "host" && front != "resize" && front != "matmul") {
        throw ArtifactError("front '" + front + "' is not known; it is one of: host, resize, matmul");
    }
    graph.resizes = !text && front == "resize";
    for (const auto& engine : variant.at("parity").object("parity")) {
        graph.proved.push_back(engine.first);
    }
    if (plain.has("left_out")) {
        const std::string here = graph.variant + " on ";
        for (const auto& one : plain.at("left_out").object("left_out")) {
            if (one.first.compare(0, here.size(), here) == 0) {
                graph.missed[one.first.substr(here.size())] = one.second.text("left_out");
            }
        }
    }
    graph.path = file_of(folder, file).string();
    return graph;
}

std::string bounded(const fs::path& path) {
    if (fs::file_size(path) > max_manifest_bytes) {
        throw ArtifactError("is larger than " + std::to_string(max_manifest_bytes) + " bytes, the bound of such files");
    }
    std::ifstream file(path, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) {
        throw ArtifactError("cannot be read");
    }
    return text;
}

// Runs `what`; an error then begins with the file that it is about.
template <typename What>
auto about(const std::string& path, What what) -> decltype(what()) {
    try {
        return what();
    } catch (const ArtifactError& error) {
        throw ArtifactError(path + ": " + error.what());
    } catch (const fs::filesystem_error& error) {
        throw ArtifactError(path + ": " + error.code().message());
    }
}

}  // namespace

Facts read_facts(std::string_view text) { return facts_of(json::parse(text)); }

Artifact read_manifest(const std::string& folder, std::string_view text, const std::string& variant) {
    const json::Value plain = json::parse(text);
    return {facts_of(plain), graph_of(folder, plain, variant, "image"), std::string(text)};
}

TextSide read_text_side(const std::string& folder, std::string_view manifest, const std::string& variant) {
    return about((fs::path(folder) / manifest_name).string(), [&] {
        const json::Value plain = json::parse(manifest);
        const json::Value& found = plain.at("variants").at(variant);
        if (!plain.has("text") || !plain.has("tokenizer") || !found.has("text")) {
            throw InputError(folder + ": has no text tower; export it again with one");
        }
        TextSide text;
        text.spec = read_text_spec(plain.at("text"));
        text.graph = graph_of(folder, plain, variant, "text");
        text.dynamic = found.has("text_length") && found.at("text_length").text("text_length") == "dynamic";
        text.tokenizer = file_of(folder, plain.at("tokenizer")).string();
        text.tokenizer_sha256 = plain.at("tokenizer").at("sha256").text("sha256");
        return text;
    });
}

Artifact open_artifact(const std::string& path, const std::string& variant) {
    std::error_code unknown;
    const fs::path where(path);
    if (fs::is_directory(where, unknown)) {
        const fs::path manifest = where / manifest_name;
        if (!fs::is_regular_file(manifest, unknown)) {
            throw ArtifactError(path + ": not an artifact, it holds no " + manifest_name +
                                "; `invariclip build` or `export` writes one");
        }
        return about(manifest.string(), [&] {
            const std::string text = bounded(manifest);
            require_whole(text);
            return read_manifest(path, text, variant);
        });
    }
    if (!fs::is_regular_file(where, unknown)) {
        throw InputError(path + ": no such file or folder");
    }
    if (!variant.empty()) {
        throw InputError(path + ": is one graph alone and has no variants; open its folder, or the variant's own file");
    }
    return about(path, [&] {
        std::ifstream file(where, std::ios::binary);
        Artifact opened;
        opened.facts = read_facts(onnx_metadata(file, metadata_key));
        opened.graph.path = path;
        return opened;
    });
}

void require_unchanged(const Graph& graph) {
    const std::string data = graph.path + ".data";
    if (graph.sha256 && sha256_file(graph.path) != *graph.sha256) {
        throw ArtifactError(graph.path + ": is not the file that was exported (digest differs); export again");
    }
    if (graph.data_sha256 && sha256_file(data) != *graph.data_sha256) {
        throw ArtifactError(data + ": is not what was exported; export again");
    }
}

std::string read_tokenizer(const TextSide& text, bool verify) {
    return about(text.tokenizer, [&] {
        std::string content = bounded(text.tokenizer);
        if (verify && sha256_of(content) != text.tokenizer_sha256) {
            throw ArtifactError("is not the file that was exported (digest differs); export again");
        }
        return content;
    });
}

}  // namespace invariclip
