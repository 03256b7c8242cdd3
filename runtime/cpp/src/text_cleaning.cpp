#include "text_cleaning.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "invariclip/invariclip.hpp"
#include "json.hpp"
#include "text_tables.hpp"

namespace invariclip {
namespace {

using Text = std::u32string;
using View = std::u32string_view;

template <typename Row>
const Row* row_of(const tables::Table<Row>& table, char32_t code) {
    const Row* found = std::upper_bound(table.begin(), table.end(), code,
                                        [](char32_t one, const Row& row) { return one < row.first; });
    return found != table.begin() && code <= (found - 1)->last ? found - 1 : nullptr;
}

bool holds(const tables::Table<tables::Range>& table, char32_t code) { return row_of(table, code) != nullptr; }

template <typename Row>
const Row* code_of(const tables::Table<Row>& table, char32_t code) {
    const Row* found =
        std::lower_bound(table.begin(), table.end(), code, [](const Row& row, char32_t one) { return row.code < one; });
    return found != table.end() && found->code == code ? found : nullptr;
}

std::optional<Text> entity_of(const tables::Table<tables::Entity>& table, const std::string& name) {
    const auto* found =
        std::lower_bound(table.begin(), table.end(), name,
                         [](const tables::Entity& row, const std::string& one) { return row.name < one; });
    return found != table.end() && name == found->name ? std::optional<Text>(code_points(found->to)) : std::nullopt;
}

bool is_digit(char32_t code) { return code >= U'0' && code <= U'9'; }
bool is_letter(char32_t code) { return (code >= U'A' && code <= U'Z') || (code >= U'a' && code <= U'z'); }
bool is_hexadecimal(char32_t code) {
    return is_digit(code) || (code >= U'A' && code <= U'F') || (code >= U'a' && code <= U'f');
}

std::string ascii(View text) {
    std::string made;
    for (const char32_t code : text) {
        made.push_back(code < 0x80 ? static_cast<char>(code) : '\x01');  // which no entity's name holds
    }
    return made;
}

// What the digits of a numeric reference stand for in HTML 5.
Text referenced(View digits, unsigned base) {
    std::uint32_t number = 0;
    for (const char32_t digit : digits) {
        const std::uint32_t value = is_digit(digit) ? digit - U'0' : (digit | 0x20U) - U'a' + 10;
        number = std::min<std::uint32_t>(number * base + value, 0x110000);  // what is above stays above
    }
    if (const tables::Pair* found = code_of(tables::replaced_references, number)) {
        return {found->to};
    }
    if ((number >= 0xD800 && number <= 0xDFFF) || number > 0x10FFFF) {
        return {U'\uFFFD'};
    }
    return holds(tables::dropped_references, number) ? Text() : Text{number};
}

// Python's html.unescape.
Text unescaped(View text) {
    Text made;
    for (std::size_t place = 0; place < text.size();) {
        if (text[place] != U'&') {
            made.push_back(text[place++]);
            continue;
        }
        std::size_t end = place + 1;
        const auto run = [&](auto belongs, std::size_t most) {
            const std::size_t begin = end;
            while (end < text.size() && end - begin < most && belongs(text[end])) {
                ++end;
            }
            return text.substr(begin, end - begin);
        };
        const auto semicolon = [&] { end += end < text.size() && text[end] == U';' ? 1 : 0; };
        if (end < text.size() && text[end] == U'#') {
            ++end;
            const bool hexadecimal = end < text.size() && (text[end] == U'x' || text[end] == U'X');
            end += hexadecimal ? 1 : 0;
            const View digits = hexadecimal ? run(is_hexadecimal, text.size()) : run(is_digit, text.size());
            if (digits.empty()) {
                made.push_back(text[place++]);
                continue;
            }
            semicolon();
            made += referenced(digits, hexadecimal ? 16 : 10);
            place = end;
            continue;
        }
        const View named = run([](char32_t code) { return View(U"\t\n\f <&#;").find(code) == View::npos; }, 32);
        if (named.empty()) {
            made.push_back(text[place++]);
            continue;
        }
        semicolon();
        const std::string name = ascii(text.substr(place + 1, end - place - 1));
        std::optional<Text> found;
        std::size_t length = name.size();
        // the longest beginning that is one, down to two characters
        for (found = entity_of(tables::entities, name); !found && length > 2;) {
            found = entity_of(tables::entities, name.substr(0, --length));
        }
        if (found) {
            made += *found;
            made += text.substr(place + 1 + length, name.size() - length);
        } else {
            made += text.substr(place, end - place);
        }
        place = end;
    }
    return made;
}

// ftfy's: only what ends in a semicolon and cannot mean anything else.
Text without_entities(View text) {
    Text made;
    for (std::size_t place = 0; place < text.size();) {
        std::size_t end = place + 1;
        if (text[place] == U'&') {
            const bool number = end < text.size() && text[end] == U'#';
            end += number ? 1 : 0;
            const std::size_t begin = end;
            while (end < text.size() && end - begin < 24 && (is_digit(text[end]) || is_letter(text[end]))) {
                ++end;
            }
            if (end > begin && end < text.size() && text[end] == U';') {
                ++end;
                const View whole = text.substr(place, end - place);
                std::optional<Text> found;
                if (number) {
                    Text meant = unescaped(whole);
                    found = meant.find(U';') == Text::npos ? std::move(meant) : Text(whole);
                } else {
                    const std::string name = ascii(whole.substr(1));
                    found = entity_of(tables::entities, name);
                    found = found ? found : entity_of(tables::shouted_entities, name);
                }
                if (found) {
                    made += *found;
                    place = end;
                    continue;
                }
            }
        }
        made.push_back(text[place++]);
    }
    return made;
}

bool in_set(int set, char32_t code) {
    const tables::Range places = tables::bad_sets.begin()[set];
    const tables::Range* first = tables::bad_ranges.begin() + places.first;
    const tables::Range* last = tables::bad_ranges.begin() + places.last;
    const tables::Range* found =
        std::upper_bound(first, last, code, [](char32_t one, const tables::Range& row) { return one < row.first; });
    return found != first && code <= (found - 1)->last;
}

// ftfy's is_bad.
bool is_bad(View text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x80; })) {
        return false;
    }
    for (std::size_t place = 0; place < text.size(); ++place) {
        for (const tables::Sequence& sequence : tables::bad_sequences) {
            std::size_t at = place;
            bool fits = true;
            for (const int set : sequence.sets) {
                if (set == -2) {
                    break;
                }
                if (set == -1) {
                    fits = at == 0;
                } else {
                    fits = at < text.size() && in_set(set, text[at]);
                    ++at;
                }
                if (!fits) {
                    break;
                }
            }
            if (fits) {
                return true;
            }
        }
    }
    return false;
}

Text replaced(View text, const tables::Table<tables::Text>& table) {
    Text made;
    for (const char32_t code : text) {
        const tables::Text* found = code < 0x80 ? nullptr : code_of(table, code);
        if (found == nullptr) {
            made.push_back(code);
        } else {
            made += code_points(found->to);
        }
    }
    return made;
}

char32_t straight(char32_t code) {
    const bool single = code == 0x2BC || (code >= 0x2018 && code <= 0x201B);
    return single ? U'\'' : code >= 0x201C && code <= 0x201F ? U'"' : code;
}

Text with_line_feeds(View text) {
    Text made;
    for (std::size_t place = 0; place < text.size(); ++place) {
        const char32_t code = text[place];
        if (code == U'\r') {
            place += place + 1 < text.size() && text[place + 1] == U'\n' ? 1 : 0;
        }
        made.push_back(code == U'\r' || code == 0x2028 || code == 0x2029 || code == 0x85 ? U'\n' : code);
    }
    return made;
}

// Without ESC [ numbers letter
Text without_terminal_escapes(View text) {
    Text made;
    for (std::size_t place = 0; place < text.size();) {
        if (text[place] == 0x1B && place + 1 < text.size() && text[place + 1] == U'[') {
            std::size_t end = place + 2;
            while (end < text.size() && (holds(tables::digits, text[end]) || text[end] == U';')) {
                ++end;
            }
            if (end < text.size() && is_letter(text[end])) {
                place = end + 1;
                continue;
            }
        }
        made.push_back(text[place++]);
    }
    return made;
}

constexpr char32_t hangul = 0xAC00;
constexpr char32_t lead_base = 0x1100;
constexpr char32_t vowel_base = 0x1161;
constexpr char32_t tail_base = 0x11A7;
constexpr char32_t leads = 19;
constexpr char32_t vowels = 21;
constexpr char32_t tails = 28;

void decompose(char32_t code, Text& to) {
    if (code >= hangul && code < hangul + leads * vowels * tails) {
        const char32_t place = code - hangul;
        to.push_back(lead_base + place / (vowels * tails));
        to.push_back(vowel_base + place % (vowels * tails) / tails);
        if (place % tails != 0) {
            to.push_back(tail_base + place % tails);
        }
        return;
    }
    const tables::Decomposition* found = code < 0xC0 ? nullptr : code_of(tables::decompositions, code);
    if (found == nullptr) {
        to.push_back(code);
        return;
    }
    decompose(found->first, to);
    if (found->second != 0) {
        to.push_back(found->second);
    }
}

int combining_class(char32_t code) {
    const tables::Class* found = code < 0x300 ? nullptr : row_of(tables::combining, code);
    return found == nullptr ? 0 : found->kind;
}

// What two characters compose to, or 0.
char32_t composed(char32_t first, char32_t second) {
    if (first >= lead_base && first < lead_base + leads && second >= vowel_base && second < vowel_base + vowels) {
        return hangul + ((first - lead_base) * vowels + second - vowel_base) * tails;
    }
    if (first >= hangul && first < hangul + leads * vowels * tails && (first - hangul) % tails == 0 &&
        second > tail_base && second < tail_base + tails) {
        return first + second - tail_base;
    }
    static const std::vector<tables::Decomposition> pairs = [] {
        std::vector<tables::Decomposition> made;
        std::copy_if(tables::decompositions.begin(), tables::decompositions.end(), std::back_inserter(made),
                     [](const tables::Decomposition& one) { return one.composes != 0; });
        std::sort(made.begin(), made.end(), [](const auto& one, const auto& other) {
            return std::make_pair(one.first, one.second) < std::make_pair(other.first, other.second);
        });
        return made;
    }();
    const auto wanted = std::make_pair(first, second);
    const auto found = std::lower_bound(pairs.begin(), pairs.end(), wanted, [](const auto& one, const auto& pair) {
        return std::make_pair(one.first, one.second) < pair;
    });
    return found != pairs.end() && std::make_pair(found->first, found->second) == wanted ? found->code : 0;
}

// Unicode's normal form C.
Text normalized(View text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x300; })) {
        return Text(text);
    }
    Text apart;
    for (const char32_t code : text) {
        decompose(code, apart);
    }
    for (auto begin = apart.begin(); begin != apart.end();) {
        if (combining_class(*begin) == 0) {
            ++begin;
            continue;
        }
        const auto end = std::find_if(begin, apart.end(), [](char32_t code) { return combining_class(code) == 0; });
        std::stable_sort(begin, end,
                         [](char32_t one, char32_t other) { return combining_class(one) < combining_class(other); });
        begin = end;
    }
    Text made;
    std::size_t starter = Text::npos;
    int last = -1;  // class of what stands last behind the starter; -1: nothing
    for (const char32_t code : apart) {
        const int kind = combining_class(code);
        if (starter != Text::npos && (last < kind || last == -1)) {
            if (const char32_t one = composed(made[starter], code); one != 0) {
                made[starter] = one;
                continue;
            }
        }
        if (kind == 0) {
            starter = made.size();
            last = -1;
        } else {
            last = kind;
        }
        made.push_back(code);
    }
    return made;
}

// A beginning of a text for a message, in one line.
std::string shown(View text) {
    Text made(text.substr(0, 60));
    std::replace_if(
        made.begin(), made.end(),
        [](char32_t code) {
            return code != U' ' && (code < 0x20 || (code >= 0x7F && code < 0xA0) || holds(tables::spaces, code));
        },
        U'\uFFFD');
    return json::quoted(utf8(made));
}

Text fixed_line(Text text, bool entities) {
    while (true) {
        const Text before = text;
        if (entities) {
            text = without_entities(text);
        }
        if (is_bad(text)) {
            throw InputError("the text " + shown(text) +
                             " looks as if it had been decoded wrongly; give it as it was meant, "
                             "in UTF-8, or embed it in Python, which repairs it by guessing");
        }
        text = replaced(replaced(text, tables::ligatures), tables::widths);
        std::transform(text.begin(), text.end(), text.begin(), straight);
        text = without_terminal_escapes(with_line_feeds(text));
        text.erase(std::remove_if(text.begin(), text.end(), [](char32_t code) { return holds(tables::removed, code); }),
                   text.end());
        text = normalized(text);
        if (text == before) {
            return text;
        }
    }
}

// ftfy's fix_text, line by line.
Text fixed(View text) {
    Text made;
    bool entities = true;
    for (std::size_t place = 0; place < text.size();) {
        const std::size_t feed = text.find(U'\n', place);
        const std::size_t end = feed == View::npos ? text.size() : feed + 1;
        const View line = text.substr(place, end - place);
        entities = entities && line.find(U'<') == View::npos;
        made += fixed_line(Text(line), entities);
        place = end;
    }
    return made;
}

Text with_single_spaces(View text) {
    Text made;
    bool between = false;
    for (const char32_t code : text) {
        if (holds(tables::spaces, code)) {
            between = !made.empty();
            continue;
        }
        if (between) {
            made.push_back(U' ');
            between = false;
        }
        made.push_back(code);
    }
    return made;
}

// Whether a sigma here is the last letter of a word.
bool is_final(View text, std::size_t place) {
    std::size_t before = place;
    while (before > 0 && holds(tables::ignorable, text[before - 1])) {
        --before;
    }
    if (before == 0 || !holds(tables::cased, text[before - 1])) {
        return false;
    }
    std::size_t after = place + 1;
    while (after < text.size() && holds(tables::ignorable, text[after])) {
        ++after;
    }
    return after == text.size() || !holds(tables::cased, text[after]);
}

// Python's str.lower.
Text lowered(View text) {
    Text made;
    for (std::size_t place = 0; place < text.size(); ++place) {
        const char32_t code = text[place];
        if (code == 0x130) {
            made += U"i\u0307";
        } else if (code == 0x3A3) {
            made.push_back(is_final(text, place) ? 0x3C2 : 0x3C3);
        } else if (const tables::Lower* found = row_of(tables::lower, code);
                   found != nullptr && (code - found->first) % found->step == 0) {
            made.push_back(static_cast<char32_t>(static_cast<std::int64_t>(code) + found->difference));
        } else {
            made.push_back(code);
        }
    }
    return made;
}

}  // namespace

std::u32string code_points(std::string_view text) {
    Text made;
    made.reserve(text.size());
    for (std::size_t place = 0; place < text.size();) {
        const auto lead = static_cast<unsigned char>(text[place]);
        const std::size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        char32_t code = length == 1 ? lead : lead & (0xFFU >> (length + 1));
        bool fits = lead < 0x80 || (lead >= 0xC2 && lead <= 0xF4 && text.size() - place >= length);
        for (std::size_t byte = 1; fits && byte < length; ++byte) {
            const auto next = static_cast<unsigned char>(text[place + byte]);
            fits = (next & 0xC0U) == 0x80U;
            code = code << 6 | (next & 0x3FU);
        }
        constexpr char32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
        if (!fits || code < least[length] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) {
            throw InputError("a text is not UTF-8 (byte " + std::to_string(place) + ")");
        }
        made.push_back(code);
        place += length;
    }
    return made;
}

std::string utf8(std::u32string_view text) {
    std::string made;
    for (const char32_t code : text) {
        const auto put = [&](std::uint32_t byte) { made.push_back(static_cast<char>(byte)); };
        if (code < 0x80) {
            put(code);
        } else if (code < 0x800) {
            put(0xC0U | code >> 6);
            put(0x80U | (code & 0x3FU));
        } else if (code < 0x10000) {
            put(0xE0U | code >> 12);
            put(0x80U | (code >> 6 & 0x3FU));
            put(0x80U | (code & 0x3FU));
        } else {
            put(0xF0U | code >> 18);
            put(0x80U | (code >> 12 & 0x3FU));
            put(0x80U | (code >> 6 & 0x3FU));
            put(0x80U | (code & 0x3FU));
        }
    }
    return made;
}

bool is_blank(std::u32string_view text) {
    return std::all_of(text.begin(), text.end(), [](char32_t code) { return holds(tables::spaces, code); });
}

std::u32string cleaned(std::u32string text, Cleaning cleaning) {
    const Text repaired = unescaped(unescaped(fixed(text)));
    Text spaced = with_single_spaces(repaired);
    return cleaning == Cleaning::lower ? lowered(spaced) : spaced;
}

}  // namespace invariclip
