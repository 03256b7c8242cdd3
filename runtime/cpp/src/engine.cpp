// What every engine is asked for, and which of them is opened.
#include "engine.hpp"

#include <future>
#include <sstream>

namespace invariclip {
namespace {

std::unique_ptr<Engine> open_engine(const std::string& name, const Graph& graph, const Input& input,
                                    const std::vector<Output>& outputs, int threads) {
#ifdef INVARICLIP_ONNXRUNTIME
    if (name == "onnxruntime") {
        return open_onnxruntime(graph, input, outputs, threads);
    }
#endif
#ifdef INVARICLIP_OPENVINO
    if (name == "openvino") {
        return open_openvino(graph, input, outputs, threads);
    }
#endif
    static_cast<void>(graph);
    static_cast<void>(input);
    static_cast<void>(outputs);
    static_cast<void>(threads);
    throw EngineError("no engine '" + name + "' was compiled in");
}

}  // namespace

std::unique_ptr<Engine> open_checked(const std::string& name, const Graph& graph, const Input& input,
                                     const std::vector<Output>& outputs, int threads, bool verify) {
    std::future<void> unchanged;
    if (verify) {
        unchanged = std::async(std::launch::async, [&graph] { require_unchanged(graph); });
    }
    std::unique_ptr<Engine> engine;
    std::exception_ptr failed;
    try {
        engine = open_engine(name, graph, input, outputs, threads);
    } catch (...) {
        failed = std::current_exception();
    }
    if (unchanged.valid()) {
        unchanged.get();  // says that the file was changed instead of what an engine makes of it
    }
    if (failed) {
        std::rethrow_exception(failed);
    }
    return engine;
}

std::vector<Output> outputs_of(const Facts& facts) {
    std::vector<Output> outputs{{embedding_name, facts.width}};
    if (!facts.classes.empty()) {
        outputs.push_back({probabilities_name, facts.classes.size()});
        outputs.push_back({logits_name, facts.classes.size()});
        if (facts.learned) {
            outputs.push_back({uncertainty_name, 0});
        }
    }
    return outputs;
}

Input image_input(const Facts& facts) {
    return {pixels_name,
            false,
            {static_cast<std::int64_t>(facts.pixels.height), static_cast<std::int64_t>(facts.pixels.width), 3}};
}

Input text_input(const TextSide& text) {
    return {ids_name, true, {text.dynamic ? -1 : static_cast<std::int64_t>(text.spec.context_length)}};
}

void refuse_input(const std::string& path, const Input& expected) {
    std::string shape = "[N";
    for (const std::int64_t side : expected.sides) {
        shape += ", " + (side == -1 ? "L" : std::to_string(side));
    }
    throw ArtifactError(path + ": does not take '" + expected.name + "' as " + (expected.ids ? "int64 " : "uint8 ") +
                        shape + "]; open " + (expected.ids ? "a text" : "an image") +
                        " graph whose projection is folded in");
}

void refuse_output(const std::string& path, const Output& expected, const std::string& found) {
    throw ArtifactError(path + ": its facts say that it answers '" + expected.name + "' as float32 [N" +
                        (expected.width == 0 ? "" : ", " + std::to_string(expected.width)) + "], but it has " + found +
                        "; export again");
}

std::string one_line(const std::string& text) {
    std::istringstream words(text);
    std::string line;
    for (std::string word; words >> word;) {
        line += (line.empty() ? "" : " ") + word;
    }
    return line;
}

std::vector<std::string> engines() {
    std::vector<std::string> known;
#ifdef INVARICLIP_ONNXRUNTIME
    known.emplace_back("onnxruntime");
#endif
#ifdef INVARICLIP_OPENVINO
    known.emplace_back("openvino");
#endif
    return known;
}

}  // namespace invariclip
