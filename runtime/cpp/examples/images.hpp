// Files to pixels, for the command line: what Pillow would decode, or an InputError.
#pragma once

#include <cstdint>
#include <invariclip/invariclip.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace invariclip::images {

struct Decoded {
    std::vector<std::uint8_t> bytes;
    std::size_t width = 0;
    std::size_t height = 0;
    Order order = Order::rgb;

    [[nodiscard]] Image image() const { return {bytes.data(), width, height, 0, order}; }
};

// Reads PPM and PGM (binary, 8 bits), and JPEG, PNG and WebP where they were compiled in. Throws InputError.
Decoded read(const std::string& path);
// The same of a file's content.
Decoded decode(std::string_view content);
// What `read` knows, in words.
std::string known();

}  // namespace invariclip::images
