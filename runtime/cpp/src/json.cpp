#include "json.hpp"

#include <cmath>
#include <cstdint>
#include <locale>
#include <sstream>

#include "invariclip/invariclip.hpp"

namespace invariclip::json {
namespace {

constexpr int max_depth = 64;

[[noreturn]] void refuse(const std::string& what) { throw ArtifactError("is not understood as JSON: " + what); }

// Bytes of the UTF-8 character that begins `text`, or 0 where it is none.
std::size_t character(std::string_view text) {
    const auto byte = [&](std::size_t place) { return static_cast<unsigned char>(text[place]); };
    const unsigned lead = byte(0);
    if (lead < 0x80) {
        return 1;
    }
    const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || text.size() < length) {
        return 0;
    }
    for (std::size_t place = 1; place < length; ++place) {
        if ((byte(place) & 0xC0U) != 0x80U) {
            return 0;
        }
    }
    const unsigned second = byte(1);
    const bool wrong = (lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
                       (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F);
    return wrong ? 0 : length;
}

void append(std::string& to, std::uint32_t code) {
    const auto put = [&](std::uint32_t byte) { to.push_back(static_cast<char>(byte)); };
    if (code < 0x80) {
        put(code);
    } else if (code < 0x800) {
        put(0xC0 | code >> 6);
        put(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        put(0xE0 | code >> 12);
        put(0x80 | (code >> 6 & 0x3F));
        put(0x80 | (code & 0x3F));
    } else {
        put(0xF0 | code >> 18);
        put(0x80 | (code >> 12 & 0x3F));
        put(0x80 | (code >> 6 & 0x3F));
        put(0x80 | (code & 0x3F));
    }
}

class Parser {
  public:
    explicit Parser(std::string_view text) : rest_(text) {}

    Value whole() {
        Value value = any(0);
        space();
        if (!rest_.empty()) {
            refuse("something stands behind the value");
        }
        return value;
    }

  private:
    Value any(int depth) {
        if (depth > max_depth) {
            refuse("it is nested deeper than " + std::to_string(max_depth));
        }
        space();
        switch (peek()) {
            case '{': return Value(object(depth));
            case '[': return Value(array(depth));
            case '"': return Value(text());
            case 't': word("true"); return Value(true);
            case 'f': word("false"); return Value(false);
            case 'n': word("null"); return Value();
            default: return Value(number());
        }
    }

    Object object(int depth) {
        Object members;
        take('{');
        if (space(), !skip('}')) {
            do {
                space();
                std::string key = text();
                space();
                take(':');
                if (!members.emplace(std::move(key), any(depth + 1)).second) {
                    refuse("a key stands twice in one object");
                }
                space();
            } while (skip(','));
            take('}');
        }
        return members;
    }

    Array array(int depth) {
        Array items;
        take('[');
        if (space(), !skip(']')) {
            do {
                items.push_back(any(depth + 1));
                space();
            } while (skip(','));
            take(']');
        }
        return items;
    }

    std::string text() {
        std::string out;
        take('"');
        while (peek() != '"') {
            const auto byte = static_cast<unsigned char>(rest_.front());
            if (byte < 0x20) {
                refuse("a control character stands in a text");
            }
            if (byte == '\\') {
                rest_.remove_prefix(1);
                escape(out);
                continue;
            }
            const std::size_t length = character(rest_);
            if (length == 0) {
                refuse("a text is not UTF-8");
            }
            out.append(rest_.substr(0, length));
            rest_.remove_prefix(length);
        }
        take('"');
        return out;
    }

    void escape(std::string& out) {
        const char kind = next();
        switch (kind) {
            case '"':
            case '\\':
            case '/': out.push_back(kind); return;
            case 'b': out.push_back('\b'); return;
            case 'f': out.push_back('\f'); return;
            case 'n': out.push_back('\n'); return;
            case 'r': out.push_back('\r'); return;
            case 't': out.push_back('\t'); return;
            case 'u': break;
            default: refuse("a text holds an unknown escape");
        }
        std::uint32_t code = hexadecimal();
        if (code >= 0xD800 && code < 0xE000) {  // two halves of one character
            const bool high = code < 0xDC00 && skip('\\') && skip('u');
            const std::uint32_t low = high ? hexadecimal() : 0;
            if (low < 0xDC00 || low >= 0xE000) {
                refuse("half a character stands alone");
            }
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        append(out, code);
    }

    std::uint32_t hexadecimal() {
        std::uint32_t code = 0;
        for (int digit = 0; digit < 4; ++digit) {
            const char sign = next();
            const bool letter = (sign >= 'a' && sign <= 'f') || (sign >= 'A' && sign <= 'F');
            if (!letter && (sign < '0' || sign > '9')) {
                refuse("a \\u escape needs four hexadecimal digits");
            }
            code = code * 16 + static_cast<std::uint32_t>(letter ? (sign | 0x20) - 'a' + 10 : sign - '0');
        }
        return code;
    }

    double number() {
        const std::string_view whole = rest_;
        skip('-');
        if (!skip('0')) {
            digits();
        }
        if (skip('.')) {
            digits();
        }
        if (skip('e') || skip('E')) {
            if (!skip('+')) {
                skip('-');
            }
            digits();
        }
        std::istringstream stream{std::string(whole.substr(0, whole.size() - rest_.size()))};
        stream.imbue(std::locale::classic());  // whatever the program's own locale takes for a decimal point
        double value = 0;
        if (!(stream >> value) || !std::isfinite(value)) {
            refuse("a number is out of range");
        }
        return value;
    }

    void digits() {
        if (rest_.empty() || rest_.front() < '0' || rest_.front() > '9') {
            refuse(rest_.empty() ? "it ends too early" : "a value is not one");
        }
        while (!rest_.empty() && rest_.front() >= '0' && rest_.front() <= '9') {
            rest_.remove_prefix(1);
        }
    }

    void word(std::string_view expected) {
        if (rest_.substr(0, expected.size()) != expected) {
            refuse("a value is not one");
        }
        rest_.remove_prefix(expected.size());
    }

    void space() {
        while (!rest_.empty() && std::string_view(" \t\r\n").find(rest_.front()) != std::string_view::npos) {
            rest_.remove_prefix(1);
        }
    }

    bool skip(char sign) {
        const bool there = !rest_.empty() && rest_.front() == sign;
        rest_.remove_prefix(there ? 1 : 0);
        return there;
    }

    void take(char sign) {
        if (!skip(sign)) {
            refuse(rest_.empty() ? "it ends too early"
                                 : std::string("there is no '") + sign + "' where one must stand");
        }
    }

    [[nodiscard]] char peek() const {
        if (rest_.empty()) {
            refuse("it ends too early");
        }
        return rest_.front();
    }

    char next() {
        const char sign = peek();
        rest_.remove_prefix(1);
        return sign;
    }

    std::string_view rest_;
};

template <typename Kind>
const Kind& as(const Value::Kind& kind, std::string_view where, const char* what) {
    const Kind* value = std::get_if<Kind>(&kind);
    if (value == nullptr) {
        throw ArtifactError(std::string(where) + " is not " + what);
    }
    return *value;
}

}  // namespace

const Object& Value::object(std::string_view where) const { return as<Object>(kind_, where, "an object"); }
const Array& Value::array(std::string_view where) const { return as<Array>(kind_, where, "a list"); }
const std::string& Value::text(std::string_view where) const { return as<std::string>(kind_, where, "a text"); }
double Value::number(std::string_view where) const { return as<double>(kind_, where, "a number"); }
bool Value::truth(std::string_view where) const { return as<bool>(kind_, where, "true or false"); }

std::size_t Value::count(std::string_view where, std::size_t least, std::size_t most) const {
    const double value = number(where);
    if (!(value >= static_cast<double>(least) && value <= static_cast<double>(most)) || value != std::floor(value)) {
        throw ArtifactError(std::string(where) + " is not a whole number from " + std::to_string(least) + " to " +
                            std::to_string(most));
    }
    return static_cast<std::size_t>(value);
}

const Value& Value::at(std::string_view key) const {
    const Object& members = object("what should hold '" + std::string(key) + "'");
    const auto found = members.find(key);
    if (found == members.end()) {
        throw ArtifactError("the fact '" + std::string(key) + "' is missing");
    }
    return found->second;
}

bool Value::has(std::string_view key) const {
    const Object* members = std::get_if<Object>(&kind_);
    const auto found = members == nullptr ? Object::const_iterator{} : members->find(key);
    return members != nullptr && found != members->end() && !found->second.is_null();
}

Value parse(std::string_view text) { return Parser(text).whole(); }

std::string quoted(std::string_view text) {
    static constexpr char digits[] = "0123456789abcdef";
    std::string out = "\"";
    for (const char sign : text) {
        const auto byte = static_cast<unsigned char>(sign);
        if (sign == '"' || sign == '\\') {
            out += {'\\', sign};
        } else if (byte < 0x20) {
            out += {'\\', 'u', '0', '0', digits[byte >> 4], digits[byte & 15]};
        } else {
            out += sign;
        }
    }
    return out + '"';
}

}  // namespace invariclip::json
