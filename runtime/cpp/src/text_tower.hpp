// The text side of an artifact: texts to tokens, tokens to embeddings, prompts to class embeddings.
#pragma once

#include <memory>

#include "engine.hpp"

namespace invariclip {

// Throws InputError where classes and templates cannot become prompts.
void require_prompts(const std::vector<std::string>& classes, const std::vector<std::string>& templates);

// From several threads at once.
class TextTower {
  public:
    // `width`: of embeddings. Throws ArtifactError.
    TextTower(TextSide side, std::size_t width, const std::string& engine, int threads, bool verify);

    [[nodiscard]] Tokens tokenize(const std::string* texts, std::size_t count) const {
        return tokenize(texts, count, 0);
    }
    [[nodiscard]] TextEmbeddings embed(const std::vector<std::string>& texts, std::size_t batch_size) const;
    // Unit means of each class's prompts, [width, classes]; adds prompts that were cut to `cut`.
    [[nodiscard]] std::vector<float> embed_classes(const std::vector<std::string>& names,
                                                   const std::vector<std::string>& templates,
                                                   std::vector<std::string>& cut) const;

  private:
    // `first`: the place that the caller knows the first of them by.
    [[nodiscard]] Tokens tokenize(const std::string* texts, std::size_t count, std::size_t first) const;
    // Texts of equal ids are embedded once, as in Python.
    void embed_tokens(const Tokens& tokens, float* to) const;

    TextSide side_;
    std::size_t width_;
    std::unique_ptr<const Tokenizer> tokenizer_;
    std::unique_ptr<Engine> engine_;
};

}  // namespace invariclip
