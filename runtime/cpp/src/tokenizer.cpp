#include "tokenizer.hpp"

#include <algorithm>
#include <array>
#include <queue>
#include <tuple>
#include <unordered_map>

#include "invariclip/invariclip.hpp"

namespace invariclip {
namespace {

constexpr std::size_t max_context = 65536;
constexpr std::size_t max_id = (std::size_t{1} << 31) - 1;
constexpr std::size_t max_text_bytes = 1'000'000;
constexpr std::size_t max_pattern = std::size_t{1} << 20;
constexpr char32_t long_s = 0x17F;  // a small s to whoever ignores case

[[noreturn]] void unknown(const std::string& what) {
    throw ArtifactError("its tokenizer is of a kind that is not read here (" + what + "); embed texts in Python");
}

std::int64_t id_of(const json::Value& plain, const char* name) {
    return static_cast<std::int64_t>(plain.count(name, 0, max_id));
}

std::vector<std::int64_t> ids_of(const json::Value& plain, const char* name) {
    std::vector<std::int64_t> made;
    for (const json::Value& one : plain.at(name).array(name)) {
        made.push_back(id_of(one, name));
    }
    return made;
}

bool is_left(const json::Value& plain, const char* name) {
    const std::string& side = plain.at(name).text(name);
    if (side != "left" && side != "right") {
        throw ArtifactError(std::string(name) + " '" + side + "' is not known; available: left, right");
    }
    return side == "left";
}

// Sorted ranges of characters that form a word, one or as many as there are.
struct Members {
    std::vector<std::pair<char32_t, char32_t>> ranges;
    bool repeated = false;

    [[nodiscard]] bool holds(char32_t code) const {
        const auto found = std::upper_bound(ranges.begin(), ranges.end(), code,
                                            [](char32_t one, const auto& row) { return one < row.first; });
        return found != ranges.begin() && code <= (found - 1)->second;
    }
};

// The pattern that an export writes: (?i:literal|...)|[\x{..}-\x{..}...]|[...]+, the first that fits.
class Pattern {
  public:
    explicit Pattern(std::string_view text) : rest_(text) {
        take("(?i:");
        literals_.emplace_back();
        for (; !rest_.empty() && rest_.front() != ')'; rest_.remove_prefix(1)) {
            const char sign = rest_.front();
            if (sign == '|') {
                literals_.emplace_back();
            } else if ((sign >= 'a' && sign <= 'z') || sign == '_' || sign == '<' || sign == '>' || sign == '\'') {
                literals_.back().push_back(static_cast<unsigned char>(sign));
            } else {
                unknown("another pattern of words");
            }
        }
        take(")");
        while (!rest_.empty()) {
            take("|[");
            Members& members = classes_.emplace_back();
            while (!rest_.empty() && rest_.front() != ']') {
                const char32_t first = number();
                take("-");
                const char32_t last = number();
                if (last < first || (!members.ranges.empty() && first <= members.ranges.back().second)) {
                    unknown("another pattern of words");
                }
                members.ranges.emplace_back(first, last);
            }
            take("]");
            if (!rest_.empty() && rest_.front() == '+') {
                members.repeated = true;
                rest_.remove_prefix(1);
            }
        }
        const auto empty = [](const std::u32string& one) { return one.empty(); };
        if (std::any_of(literals_.begin(), literals_.end(), empty)) {
            unknown("another pattern of words");
        }
    }

    // How long the word is that begins here; 0: none does.
    [[nodiscard]] std::size_t word(std::u32string_view text) const {
        for (const std::u32string& literal : literals_) {
            const bool fits =
                text.size() >= literal.size() &&
                std::equal(literal.begin(), literal.end(), text.begin(), [](char32_t one, char32_t other) {
                    const char32_t small = other >= U'A' && other <= U'Z' ? other + 32 : other;
                    return one == small || (one == U's' && other == long_s);
                });
            if (fits) {
                return literal.size();
            }
        }
        for (const Members& members : classes_) {
            std::size_t length = 0;
            while (length < text.size() && (length == 0 || members.repeated) && members.holds(text[length])) {
                ++length;
            }
            if (length > 0) {
                return length;
            }
        }
        return 0;
    }

  private:
    void take(std::string_view sign) {
        if (rest_.substr(0, sign.size()) != sign) {
            unknown("another pattern of words");
        }
        rest_.remove_prefix(sign.size());
    }

    char32_t number() {
        take("\\x{");
        char32_t code = 0;
        std::size_t digits = 0;
        for (; !rest_.empty() && rest_.front() != '}' && digits < 6; rest_.remove_prefix(1), ++digits) {
            const std::size_t value = std::string_view("0123456789ABCDEF").find(rest_.front());
            if (value == std::string_view::npos) {
                unknown("another pattern of words");
            }
            code = code * 16 + static_cast<char32_t>(value);
        }
        take("}");
        return code;
    }

    std::string_view rest_;
    std::vector<std::u32string> literals_;
    std::vector<Members> classes_;
};

// GPT-2's characters for bytes, as UTF-8: printable ones stand for themselves.
std::array<std::string, 256> byte_names() {
    std::array<std::string, 256> names;
    char32_t next = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        const char32_t code = printable ? byte : next++;
        names[byte] = utf8(std::u32string_view(&code, 1));
    }
    return names;
}

bool absent(const json::Value& plain, const char* name) { return !plain.has(name); }

bool is(const json::Value& plain, const char* name, std::string_view wanted) {
    return plain.has(name) && plain.at(name).text(name) == wanted;
}

}  // namespace

TextSpec read_text_spec(const json::Value& plain) {
    TextSpec spec;
    spec.context_length = plain.at("context_length").count("context_length", 2, max_context);
    spec.start_token_ids = ids_of(plain, "start_token_ids");
    spec.end_token_ids = ids_of(plain, "end_token_ids");
    spec.pad_token_id = id_of(plain.at("pad_token_id"), "pad_token_id");
    spec.clean = plain.at("clean").text("clean");
    spec.pads_left = is_left(plain, "pad_side");
    spec.cuts_left = is_left(plain, "cut_side");
    if (plain.has("last_token_id")) {
        spec.last_token_id = id_of(plain.at("last_token_id"), "last_token_id");
    }
    if (plain.has("zeroed_token_id")) {
        spec.zeroed_token_id = id_of(plain.at("zeroed_token_id"), "zeroed_token_id");
    }
    if (spec.start_token_ids.size() + spec.end_token_ids.size() + (spec.last_token_id ? 1 : 0) >= spec.context_length) {
        throw ArtifactError("context_length " + std::to_string(spec.context_length) +
                            " leaves no room for text beside the special tokens");
    }
    return spec;
}

struct Tokenizer::Vocabulary {
    struct Merge {
        std::uint32_t rank;
        std::uint32_t to;
    };

    explicit Vocabulary(Pattern pattern) : words(std::move(pattern)) {}

    Pattern words;
    std::array<std::uint32_t, 256> bytes{};      // ids of a byte inside a word
    std::array<std::uint32_t, 256> end_bytes{};  // and at its end
    std::unordered_map<std::uint64_t, Merge> merges;

    [[nodiscard]] const Merge* merge(std::uint32_t left, std::uint32_t right) const {
        const auto found = merges.find(std::uint64_t{left} << 32 | right);
        return found == merges.end() ? nullptr : &found->second;
    }

    // A word's ids: of neighbours that merge, those of the lowest rank first, of equal ones the first.
    void encode(std::string_view word, std::vector<std::int64_t>& to) const {
        constexpr std::size_t none = static_cast<std::size_t>(-1);
        struct Part {
            std::uint32_t id;
            std::size_t before;
            std::size_t after;
            bool gone;
        };
        std::vector<Part> parts(word.size());
        for (std::size_t place = 0; place < word.size(); ++place) {
            const auto byte = static_cast<unsigned char>(word[place]);
            const bool last = place + 1 == word.size();
            parts[place] = {last ? end_bytes[byte] : bytes[byte], place == 0 ? none : place - 1,
                            last ? none : place + 1, false};
        }
        using Waiting = std::tuple<std::uint32_t, std::size_t, std::uint32_t>;  // rank, place, id that comes of it
        std::priority_queue<Waiting, std::vector<Waiting>, std::greater<>> waiting;
        const auto consider = [&](std::size_t left) {
            if (left != none && parts[left].after != none) {
                if (const Merge* one = merge(parts[left].id, parts[parts[left].after].id)) {
                    waiting.emplace(one->rank, left, one->to);
                }
            }
        };
        for (std::size_t place = 0; place < parts.size(); ++place) {
            consider(place);
        }
        while (!waiting.empty()) {
            const auto [rank, place, made] = waiting.top();
            waiting.pop();
            Part& left = parts[place];
            if (left.gone || left.after == none) {
                continue;
            }
            Part& right = parts[left.after];
            const Merge* still = merge(left.id, right.id);
            if (still == nullptr || still->rank != rank || still->to != made) {  // a neighbour has changed since
                continue;
            }
            left.id = made;
            right.gone = true;
            left.after = right.after;
            if (left.after != none) {
                parts[left.after].before = place;
            }
            consider(left.before);
            consider(place);
        }
        for (const Part& part : parts) {
            if (!part.gone) {
                to.push_back(part.id);
            }
        }
    }
};

Tokenizer::Tokenizer(std::string_view content, const TextSpec& spec) : spec_(spec), cleaning_(Cleaning::lower) {
    if (spec.clean != "lower" && spec.clean != "whitespace") {
        unknown("it cleans texts by '" + spec.clean + "', and lower and whitespace are known");
    }
    cleaning_ = spec.clean == "lower" ? Cleaning::lower : Cleaning::whitespace;
    const json::Value plain = json::parse(content);
    if (!absent(plain, "normalizer") || !plain.at("added_tokens").array("added_tokens").empty()) {
        unknown("it has a normalizer or added tokens");
    }
    const json::Value& model = plain.at("model");
    const bool ordinary = is(model, "type", "BPE") && absent(model, "dropout") && absent(model, "unk_token") &&
                          is(model, "end_of_word_suffix", "</w>") &&
                          (absent(model, "continuing_subword_prefix") || is(model, "continuing_subword_prefix", ""));
    if (!ordinary || !is(plain.at("pre_tokenizer"), "type", "Sequence")) {
        unknown("another model than CLIP's byte pairs");
    }
    const json::Array& steps = plain.at("pre_tokenizer").at("pretokenizers").array("pretokenizers");
    const bool splits = steps.size() == 2 && is(steps[0], "type", "Split") && is(steps[0], "behavior", "Removed") &&
                        steps[0].at("invert").truth("invert") && is(steps[1], "type", "ByteLevel") &&
                        !steps[1].at("add_prefix_space").truth("add_prefix_space") &&
                        !steps[1].at("use_regex").truth("use_regex");
    if (!splits) {
        unknown("texts are split otherwise");
    }
    const std::string& pattern = steps[0].at("pattern").at("Regex").text("Regex");
    if (pattern.size() > max_pattern) {
        unknown("another pattern of words");
    }
    auto made = std::make_unique<Vocabulary>(Pattern(pattern));
    std::unordered_map<std::string, std::uint32_t> ids;
    for (const auto& [piece, id] : model.at("vocab").object("vocab")) {
        ids.emplace(piece, static_cast<std::uint32_t>(id.count("an id", 0, max_id)));
    }
    const auto known = [&](const std::string& piece) {
        const auto found = ids.find(piece);
        if (found == ids.end()) {
            throw ArtifactError("the vocabulary lacks " + json::quoted(piece));
        }
        return found->second;
    };
    const std::array<std::string, 256> names = byte_names();
    for (std::size_t byte = 0; byte < names.size(); ++byte) {
        made->bytes[byte] = known(names[byte]);
        made->end_bytes[byte] = known(names[byte] + "</w>");
    }
    std::uint32_t rank = 0;
    for (const json::Value& one : model.at("merges").array("merges")) {
        const json::Array& pair = one.array("a merge");
        if (pair.size() != 2) {
            throw ArtifactError("a merge is not of two pieces");
        }
        const std::string& left = pair[0].text("a merge");
        const std::string& right = pair[1].text("a merge");
        // of a pair that stands twice, the later rank counts, as in the tokenizers library
        made->merges[std::uint64_t{known(left)} << 32 | known(right)] = {rank++, known(left + right)};
    }
    vocabulary_ = std::move(made);
}

Tokenizer::~Tokenizer() = default;

bool Tokenizer::row(const std::string& text, std::int64_t* to) const {
    if (text.size() > max_text_bytes) {
        throw InputError("a text of " + std::to_string(text.size()) + " bytes is too long; the bound is " +
                         std::to_string(max_text_bytes));
    }
    const std::u32string clean = cleaned(code_points(text), cleaning_);
    std::vector<std::int64_t> ids;
    for (std::u32string_view rest = clean; !rest.empty();) {
        const std::size_t length = vocabulary_->words.word(rest);
        if (length > 0) {
            vocabulary_->encode(utf8(rest.substr(0, length)), ids);
        }
        rest.remove_prefix(std::max<std::size_t>(length, 1));
    }
    const std::size_t room = spec_.room();
    const bool cut = ids.size() > room;
    if (cut && spec_.cuts_left) {
        ids.erase(ids.begin(), ids.end() - static_cast<std::ptrdiff_t>(room));
    } else if (cut) {
        ids.resize(room);
    }
    std::vector<std::int64_t> all = spec_.start_token_ids;
    all.insert(all.end(), ids.begin(), ids.end());
    all.insert(all.end(), spec_.end_token_ids.begin(), spec_.end_token_ids.end());
    std::fill_n(to, spec_.context_length, spec_.pad_token_id);
    const std::size_t columns = spec_.context_length - (spec_.last_token_id ? 1 : 0);
    std::copy(all.begin(), all.end(), to + (spec_.pads_left ? columns - all.size() : 0));
    if (spec_.last_token_id) {
        to[columns] = *spec_.last_token_id;
    }
    if (spec_.zeroed_token_id) {
        std::replace(to, to + spec_.context_length, *spec_.zeroed_token_id, std::int64_t{0});
    }
    return cut;
}

std::size_t longest(const std::vector<std::int64_t>& rows, const TextSpec& spec) {
    const std::size_t columns = spec.context_length;
    if (spec.end_token_ids.empty() || spec.pads_left || spec.last_token_id || spec.zeroed_token_id) {
        return columns;
    }
    std::size_t length = 0;
    for (std::size_t place = 0; place < rows.size(); ++place) {
        if (rows[place] != spec.pad_token_id) {
            length = std::max(length, place % columns + 1);
        }
    }
    // where texts are padded with one of their own end ids, the first of those still belong to the text
    for (auto id = spec.end_token_ids.rbegin(); id != spec.end_token_ids.rend() && *id == spec.pad_token_id; ++id) {
        ++length;
    }
    return std::min(std::max<std::size_t>(length, 1), columns);
}

}  // namespace invariclip
