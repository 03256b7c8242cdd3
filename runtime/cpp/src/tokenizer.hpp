// Texts to token ids, equal to Python's `invariclip.preprocessing.tokenizer` for CLIP's byte-level vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"
#include "text_cleaning.hpp"

namespace invariclip {

// What stands around a text's own ids; the names are the manifest's.
struct TextSpec {
    std::size_t context_length = 0;
    std::vector<std::int64_t> start_token_ids;
    std::vector<std::int64_t> end_token_ids;
    std::int64_t pad_token_id = 0;
    std::string clean;  // which of Python's cleanings
    bool pads_left = false;
    bool cuts_left = false;
    std::optional<std::int64_t> last_token_id;
    std::optional<std::int64_t> zeroed_token_id;

    [[nodiscard]] std::size_t room() const noexcept {
        return context_length - start_token_ids.size() - end_token_ids.size() - (last_token_id ? 1 : 0);
    }
};

// Throws ArtifactError.
TextSpec read_text_spec(const json::Value& plain);

class Tokenizer {
  public:
    // The content of a tokenizer.json. Throws ArtifactError where it is none, or of a kind that is not read here.
    Tokenizer(std::string_view content, const TextSpec& spec);
    ~Tokenizer();

    // Writes context_length ids; says whether the text was cut. Throws InputError where it is too long, no UTF-8, or
    // was decoded wrongly. From several threads at once.
    bool row(const std::string& text, std::int64_t* to) const;

  private:
    struct Vocabulary;
    TextSpec spec_;
    Cleaning cleaning_;
    std::unique_ptr<const Vocabulary> vocabulary_;
};

// How many columns are not padding in every one of the rows [count, context_length], as Python's `cut_to_longest`.
std::size_t longest(const std::vector<std::int64_t>& rows, const TextSpec& spec);

}  // namespace invariclip
