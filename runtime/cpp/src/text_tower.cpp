#include "text_tower.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "batching.hpp"

namespace invariclip {
namespace {

constexpr std::size_t max_classes = 100'000;
constexpr std::size_t max_templates = 1'000;
constexpr std::size_t texts_at_once = 64;      // as Python embeds the prompts of classes
constexpr std::size_t prompts_at_once = 1024;  // whose embeddings are held before they are added up

std::unique_ptr<const Tokenizer> tokenizer_of(const TextSide& side, bool verify) {
    const std::string content = read_tokenizer(side, verify);
    try {
        return std::make_unique<Tokenizer>(content, side.spec);
    } catch (const ArtifactError& error) {
        throw ArtifactError(side.tokenizer + ": " + error.what());
    }
}

std::string repeated(const std::vector<std::string>& names) {
    std::vector<std::string> sorted(names);
    std::sort(sorted.begin(), sorted.end());
    const auto found = std::adjacent_find(sorted.begin(), sorted.end());
    return found == sorted.end() ? "" : *found;
}

}  // namespace

void require_prompts(const std::vector<std::string>& classes, const std::vector<std::string>& templates) {
    if (classes.empty()) {
        throw InputError("give at least one class");
    }
    if (classes.size() > max_classes || templates.size() > max_templates) {
        throw InputError(std::to_string(classes.size()) + " classes and " + std::to_string(templates.size()) +
                         " templates are too many; up to " + std::to_string(max_classes) + " and " +
                         std::to_string(max_templates) + " are served");
    }
    for (const std::string& name : classes) {
        if (is_blank(code_points(name))) {
            throw InputError("class names must not be empty");
        }
    }
    if (const std::string twice = repeated(classes); !twice.empty()) {
        throw InputError("class names must not be repeated: " + json::quoted(twice));
    }
    for (const std::string& one : templates) {
        const std::size_t slot = one.find("{}");
        if (slot == std::string::npos || one.find("{}", slot + 2) != std::string::npos) {
            throw InputError("a template needs exactly one {} for the class name: " + json::quoted(one));
        }
    }
    if (const std::string twice = repeated(templates); !twice.empty()) {
        throw InputError("a template is given twice and would count twice: " + json::quoted(twice));
    }
}

TextTower::TextTower(TextSide side, std::size_t width, const std::string& engine, int threads, bool verify)
    : side_(std::move(side)), width_(width), tokenizer_(tokenizer_of(side_, verify)) {
    engine_ = open_checked(engine, side_.graph, text_input(side_), {{embedding_name, width_}}, threads, verify);
}

Tokens TextTower::tokenize(const std::string* texts, std::size_t count, std::size_t first) const {
    Tokens made;
    made.count = count;
    made.width = side_.spec.context_length;
    made.ids.resize(made.count * made.width);
    for (std::size_t place = 0; place < count; ++place) {
        try {
            if (tokenizer_->row(texts[place], made.ids.data() + place * made.width)) {
                made.cut_texts.push_back(place);
            }
        } catch (const InputError& error) {
            throw InputError("text " + std::to_string(first + place) + ": " + error.what());
        }
    }
    return made;
}

TextEmbeddings TextTower::embed(const std::vector<std::string>& texts, std::size_t batch_size) const {
    TextEmbeddings all;
    all.embeddings.width = width_;
    all.embeddings.count = texts.size();
    all.embeddings.values.resize(texts.size() * width_);
    for (std::size_t begin = 0; begin < texts.size(); begin += batch_size) {
        const std::size_t count = std::min(batch_size, texts.size() - begin);
        const Tokens tokens = tokenize(texts.data() + begin, count, begin);
        for (const std::size_t place : tokens.cut_texts) {
            all.cut_texts.push_back(begin + place);
        }
        embed_tokens(tokens, all.embeddings.values.data() + begin * width_);
    }
    return all;
}

void TextTower::embed_tokens(const Tokens& tokens, float* to) const {
    std::map<std::vector<std::int64_t>, std::size_t> known;
    std::vector<std::size_t> row_of(tokens.count);
    std::vector<std::int64_t> ids;
    for (std::size_t place = 0; place < tokens.count; ++place) {
        const auto* first = tokens.ids.data() + place * tokens.width;
        const std::vector<std::int64_t> row(first, first + tokens.width);
        const auto [found, fresh] = known.emplace(row, known.size());
        row_of[place] = found->second;
        if (fresh) {
            ids.insert(ids.end(), row.begin(), row.end());
        }
    }
    const std::size_t length = side_.dynamic ? longest(ids, side_.spec) : tokens.width;
    std::vector<float> rows(known.size() * width_);
    std::size_t begin = 0;
    for (const Run& run : plan_runs(known.size())) {
        std::vector<std::int64_t> batch(run.bucket * length);
        for (std::size_t row = 0; row < run.bucket; ++row) {
            const auto* from = ids.data() + (begin + std::min(row, run.rows - 1)) * tokens.width;
            std::copy_n(from, length, batch.data() + row * length);
        }
        std::vector<float> answered(run.bucket * width_);
        engine_->run({batch.data(), {run.bucket, length}}, {{embedding_name, width_, answered.data()}});
        std::copy_n(answered.data(), run.rows * width_, rows.data() + begin * width_);
        begin += run.rows;
    }
    for (std::size_t place = 0; place < tokens.count; ++place) {
        std::copy_n(rows.data() + row_of[place] * width_, width_, to + place * width_);
    }
}

std::vector<float> TextTower::embed_classes(const std::vector<std::string>& names,
                                            const std::vector<std::string>& templates,
                                            std::vector<std::string>& cut) const {
    const std::size_t total = names.size() * templates.size();
    std::vector<double> sums(names.size() * width_);
    for (std::size_t begin = 0; begin < total; begin += prompts_at_once) {
        std::vector<std::string> prompts;
        for (std::size_t place = begin; place < std::min(begin + prompts_at_once, total); ++place) {
            std::string prompt = templates[place % templates.size()];
            prompts.push_back(prompt.replace(prompt.find("{}"), 2, names[place / templates.size()]));
        }
        const TextEmbeddings found = embed(prompts, texts_at_once);
        for (const std::size_t place : found.cut_texts) {
            cut.push_back(prompts[place]);
        }
        for (std::size_t place = 0; place < prompts.size(); ++place) {
            const float* row = found.embeddings.row(place);
            double* sum = sums.data() + (begin + place) / templates.size() * width_;
            std::transform(row, row + width_, sum, sum,
                           [](float value, double all) { return all + static_cast<double>(value); });
        }
    }
    std::vector<float> made(sums.size());
    for (std::size_t one = 0; one < names.size(); ++one) {
        const double* sum = sums.data() + one * width_;
        const double length = std::sqrt(std::inner_product(sum, sum + width_, sum, 0.0));
        if (!(length > 0 && std::isfinite(length))) {
            throw InputError("the prompts of class " + json::quoted(names[one]) +
                             " have no mean direction; give it other words");
        }
        for (std::size_t place = 0; place < width_; ++place) {
            made[place * names.size() + one] = static_cast<float>(sum[place] / length);
        }
    }
    return made;
}

}  // namespace invariclip
