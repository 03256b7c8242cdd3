// JSON, strictly, of bounded size and depth: what an artifact says of itself.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace invariclip::json {

class Value;
using Array = std::vector<Value>;
using Object = std::map<std::string, Value, std::less<>>;

// A value; asking it for what it is not throws ArtifactError, which names where it stands.
class Value {
  public:
    using Kind = std::variant<std::nullptr_t, bool, double, std::string, Array, Object>;

    Value() : kind_(nullptr) {}
    explicit Value(Kind kind) : kind_(std::move(kind)) {}

    [[nodiscard]] bool is_null() const noexcept { return std::holds_alternative<std::nullptr_t>(kind_); }
    [[nodiscard]] const Object& object(std::string_view where) const;
    [[nodiscard]] const Array& array(std::string_view where) const;
    [[nodiscard]] const std::string& text(std::string_view where) const;
    [[nodiscard]] double number(std::string_view where) const;
    [[nodiscard]] bool truth(std::string_view where) const;
    // A whole number from `least` to `most`
    [[nodiscard]] std::size_t count(std::string_view where, std::size_t least, std::size_t most) const;
    // A member of an object; `has` tells whether it is there and not null
    [[nodiscard]] const Value& at(std::string_view key) const;
    [[nodiscard]] bool has(std::string_view key) const;

  private:
    Kind kind_;
};

// Reads one value and nothing behind it. Throws ArtifactError.
Value parse(std::string_view text);

// A text as JSON writes it, with quotes.
std::string quoted(std::string_view text);

}  // namespace invariclip::json
