// invariclip-classify: what `invariclip predict` and `embed` do, in C++.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <sstream>

#include "json.hpp"
#include "images.hpp"

namespace {

using invariclip::json::quoted;

constexpr const char* usage =
    "usage: invariclip-classify ARTIFACT IMAGE...\n"
    "  ARTIFACT  a folder name.icm, or an image.onnx alone\n"
    "  --engine NAME --variant NAME --threads N --batch-size N --top-k K\n"
    "  --site FILE                    what `invariclip adapt` measured of the images' place\n"
    "  --class NAME...                other classes than the artifact's, one an option\n"
    "  --template TEXT...             prompts of those, with one {} for the name\n"
    "  --abstain-above U|calibrated   give no label above an uncertainty\n"
    "  --embed                        embeddings in place of classes\n"
    "  --no-verify                    do not hold the graph's files against their digests\n"
    "  --json                         one JSON object an image\n";

struct Asked {
    std::string artifact;
    std::vector<std::string> images;
    std::string site;
    std::vector<std::string> classes;
    std::vector<std::string> templates;
    invariclip::LoadOptions load;
    invariclip::ClassifyOptions classify;
    bool embed = false;
    bool json = false;
};

double number(const std::string& option, const std::string& text) {
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    double value = 0;
    if (!(stream >> value) || stream.peek() != std::istringstream::traits_type::eof()) {
        throw invariclip::InputError(option + " takes a number, not '" + text + "'");
    }
    return value;
}

std::size_t count(const std::string& option, const std::string& text) {
    const double value = number(option, text);
    if (!(value >= 1 && value <= 1e6) || value != static_cast<double>(static_cast<std::size_t>(value))) {
        throw invariclip::InputError(option + " takes a whole number from 1, not '" + text + "'");
    }
    return static_cast<std::size_t>(value);
}

Asked read(const std::vector<std::string>& words) {
    Asked asked;
    for (std::size_t place = 0; place < words.size(); ++place) {
        const std::string& word = words[place];
        const auto value = [&]() -> const std::string& {
            if (place + 1 == words.size()) {
                throw invariclip::InputError(word + " needs a value");
            }
            return words[++place];
        };
        if (word == "--embed") {
            asked.embed = true;
        } else if (word == "--json") {
            asked.json = true;
        } else if (word == "--no-verify") {
            asked.load.verify = false;
        } else if (word == "--engine") {
            asked.load.engine = value();
        } else if (word == "--variant") {
            asked.load.variant = value();
        } else if (word == "--site") {
            asked.site = value();
        } else if (word == "--class") {
            asked.classes.push_back(value());
        } else if (word == "--template") {
            asked.templates.push_back(value());
        } else if (word == "--threads") {
            asked.load.threads = static_cast<int>(count(word, value()));
        } else if (word == "--batch-size") {
            asked.classify.batch_size = count(word, value());
        } else if (word == "--top-k") {
            asked.classify.top_k = count(word, value());
        } else if (word == "--abstain-above") {
            const std::string& limit = value();
            asked.classify.abstain = limit == "calibrated" ? invariclip::Abstain::calibrated()
                                                           : invariclip::Abstain::above(number(word, limit));
        } else if (word.rfind("--", 0) == 0) {
            throw invariclip::InputError("no option is called " + word);
        } else if (asked.artifact.empty()) {
            asked.artifact = word;
        } else {
            asked.images.push_back(word);
        }
    }
    if (asked.classes.empty() && !asked.templates.empty()) {
        throw invariclip::InputError("--template is of other classes; give them by --class");
    }
    if (asked.images.empty()) {
        throw invariclip::InputError("give an artifact and at least one image");
    }
    return asked;
}

void write_list(std::ostream& out, const float* values, std::size_t count) {
    for (std::size_t place = 0; place < count; ++place) {
        out << (place == 0 ? "[" : ", ") << values[place];
    }
    out << (count == 0 ? "[]" : "]");
}

void write_json(std::ostream& out, const invariclip::Prediction& answer) {
    out << "\"label\": " << (answer.label ? quoted(*answer.label) : "null") << ", \"index\": " << answer.index
        << ", \"probability\": " << answer.probability << ", \"ranking\": [";
    for (std::size_t place = 0; place < answer.ranking.size(); ++place) {
        const invariclip::RankedClass& one = answer.ranking[place];
        out << (place == 0 ? "" : ", ") << "{\"label\": " << quoted(one.label)
            << ", \"probability\": " << one.probability << "}";
    }
    out << "], \"probabilities\": ";
    write_list(out, answer.probabilities.data(), answer.probabilities.size());
    out << ", \"uncertainty\": ";
    answer.uncertainty ? out << *answer.uncertainty : out << "null";
    out << ", \"abstained\": " << (answer.abstained ? "true" : "false");
}

void write_text(std::ostream& out, const invariclip::Prediction& answer) {
    out << answer.label.value_or("not sure");
    for (const auto& [label, probability] : answer.ranking) {
        out << "  " << label << ' ' << probability;
    }
    if (answer.uncertainty) {
        out << "  uncertainty " << *answer.uncertainty;
    }
}

void answer(const Asked& asked, std::ostream& out) {
    auto model = invariclip::Model::load(asked.artifact, asked.load);
    if (!asked.classes.empty()) {
        model = model.with_classes(asked.classes, asked.templates);
    }
    if (!asked.site.empty()) {
        model = model.with_site(invariclip::Site::read(asked.site));
    }
    for (const std::string& warning : model.warnings()) {
        std::cerr << "warning: " << warning << '\n';
    }
    out.imbue(std::locale::classic());
    out.precision(asked.json || asked.embed ? std::numeric_limits<float>::max_digits10 : 4);
    const std::size_t most = asked.classify.batch_size;
    for (std::size_t begin = 0; begin < asked.images.size(); begin += most) {  // no more than a batch in memory
        const std::size_t end = std::min(begin + most, asked.images.size());
        std::vector<invariclip::images::Decoded> decoded;
        std::vector<invariclip::Image> images;
        for (std::size_t place = begin; place < end; ++place) {
            decoded.push_back(invariclip::images::read(asked.images[place]));
        }
        for (const auto& one : decoded) {
            images.push_back(one.image());
        }
        invariclip::Rows embeddings;
        std::vector<invariclip::Prediction> predictions;
        if (asked.embed) {
            embeddings = model.embed(images, most);
        } else {
            predictions = model.classify(images, asked.classify);
        }
        for (std::size_t place = begin; place < end; ++place) {
            const std::string& name = asked.images[place];
            out << (asked.json ? "{\"image\": " + quoted(name) + ", " : name + ": ");
            if (asked.embed) {
                out << (asked.json ? "\"embedding\": " : "");
                write_list(out, embeddings.row(place - begin), embeddings.width);
            } else if (asked.json) {
                write_json(out, predictions[place - begin]);
            } else {
                write_text(out, predictions[place - begin]);
            }
            out << (asked.json ? "}\n" : "\n");
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> words(arguments + 1, arguments + count);
    if (words.empty() || words.front() == "--help") {
        (words.empty() ? std::cerr : std::cout) << usage;
        return words.empty() ? 2 : 0;
    }
    try {
        answer(read(words), std::cout);
    } catch (const std::exception& error) {
        std::cerr << "invariclip-classify: " << error.what() << '\n';
        return 2;
    }
    return 0;
}
