// Texts as Python's `invariclip.preprocessing.tokenizer` cleans them before it cuts them into tokens.
#pragma once

#include <string>
#include <string_view>

namespace invariclip {

// UTF-8 to code points and back. Throws InputError where the bytes are no UTF-8.
std::u32string code_points(std::string_view text);
std::string utf8(std::u32string_view text);

// Whether nothing but spaces is there.
bool is_blank(std::u32string_view text);

enum class Cleaning { lower, whitespace };

// ftfy, HTML's entities twice, single spaces, and small letters where that is asked for. Throws InputError where the
// text looks as if it had been decoded wrongly, which ftfy repairs by guessing and this does not.
std::u32string cleaned(std::u32string text, Cleaning cleaning);

}  // namespace invariclip
