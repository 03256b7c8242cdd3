#include "images.hpp"

#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#ifdef INVARICLIP_JPEG
#include <jpeglib.h>
// after jpeglib.h, which it needs
#include <jerror.h>
#endif
#ifdef INVARICLIP_PNG
#include <png.h>
#endif
#ifdef INVARICLIP_WEBP
#include <webp/decode.h>
#endif

namespace invariclip::images {
namespace {

constexpr std::uintmax_t max_file_bytes = std::uintmax_t{1} << 30;

void allocate(Decoded& to, std::size_t width, std::size_t height, Order order) {
    if (width == 0 || height == 0 || width > max_image_pixels / height) {
        throw InputError(std::to_string(width) + "x" + std::to_string(height) +
                         " pixels are none, or above the limit of " + std::to_string(max_image_pixels));
    }
    to.width = width;
    to.height = height;
    to.order = order;
    to.bytes.resize(width * height * channels_of(order));
}

std::size_t number(std::string_view& rest) {
    while (!rest.empty()) {
        if (rest.front() == '#') {
            rest.remove_prefix(std::min(rest.find('\n'), rest.size()));
        } else if (std::strchr(" \t\r\n\v\f", rest.front()) == nullptr || rest.front() == '\0') {
            break;
        } else {
            rest.remove_prefix(1);
        }
    }
    std::size_t value = 0;
    std::size_t digits = 0;
    for (; digits < rest.size() && rest[digits] >= '0' && rest[digits] <= '9'; ++digits) {
        value = value * 10 + static_cast<std::size_t>(rest[digits] - '0');
        if (value > max_image_pixels) {
            throw InputError("a number in its header is above " + std::to_string(max_image_pixels));
        }
    }
    if (digits == 0) {
        throw InputError("its header lacks a number");
    }
    rest.remove_prefix(digits);
    return value;
}

Decoded netpbm(std::string_view content) {
    const Order order = content[1] == '6' ? Order::rgb : Order::grey;
    std::string_view rest = content.substr(2);
    const std::size_t width = number(rest);
    const std::size_t height = number(rest);
    const std::size_t most = number(rest);
    if (most != 255) {
        throw InputError("its levels end at " + std::to_string(most) + ", only 255 is read");
    }
    rest.remove_prefix(rest.empty() ? 0 : 1);
    if (width != 0 && rest.size() / width / channels_of(order) < height) {
        throw InputError("it ends too early");
    }
    Decoded made;
    allocate(made, width, height, order);
    std::memcpy(made.bytes.data(), rest.data(), made.bytes.size());
    return made;
}

#ifdef INVARICLIP_JPEG
// libjpeg leaves by longjmp, which must not pass over anything that C++ would destroy: this holds only plain things.
struct Failure {
    jpeg_error_mgr manager;
    std::jmp_buf back;
    char reason[JMSG_LENGTH_MAX];
    bool early;
};

void failed(j_common_ptr info) {
    auto* failure = reinterpret_cast<Failure*>(info->err);
    info->err->format_message(info, failure->reason);
    std::longjmp(failure->back, 1);
}

void warned(j_common_ptr info, int level) {
    if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) {
        reinterpret_cast<Failure*>(info->err)->early = true;
    }
}

bool begun(jpeg_decompress_struct& info, Failure& failure, std::string_view content) {
    if (setjmp(failure.back) != 0) {
        return false;
    }
    jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(content.data()), content.size());
    jpeg_read_header(&info, TRUE);
    return true;
}

bool finished(jpeg_decompress_struct& info, Failure& failure, std::uint8_t* to, std::size_t stride) {
    if (setjmp(failure.back) != 0) {
        return false;
    }
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = to + info.output_scanline * stride;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    return true;
}

Decoded jpeg(std::string_view content) {
    jpeg_decompress_struct info;
    Failure failure{};
    info.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = failed;
    failure.manager.emit_message = warned;
    jpeg_create_decompress(&info);
    struct Guard {
        jpeg_decompress_struct& of;
        ~Guard() { jpeg_destroy_decompress(&of); }
    } const guard{info};
    if (!begun(info, failure, content)) {
        throw InputError(std::string("damaged JPEG (") + failure.reason + ")");
    }
    if (info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK) {
        throw InputError("a JPEG in CMYK; convert it to RGB");
    }
    const bool grey = info.jpeg_color_space == JCS_GRAYSCALE;
    info.out_color_space = grey ? JCS_GRAYSCALE : JCS_RGB;
    Decoded made;
    allocate(made, info.image_width, info.image_height, grey ? Order::grey : Order::rgb);
    const bool whole = finished(info, failure, made.bytes.data(), made.width * channels_of(made.order));
    if (!whole || failure.early) {
        throw InputError(std::string("damaged JPEG (") + (whole ? "it ends too early" : failure.reason) + ")");
    }
    return made;
}
#endif

#ifdef INVARICLIP_PNG
Decoded png(std::string_view content) {
    constexpr std::size_t kind_at = 25;  // colour type in the header; depth is the byte before
    if (content.size() < 33) {
        throw InputError("damaged PNG (it ends too early)");
    }
    const auto depth = static_cast<unsigned char>(content[kind_at - 1]);
    const auto kind = static_cast<unsigned char>(content[kind_at]);
    const bool plain = depth == 8 && (kind == 0 || kind == 2 || kind == 6);
    if (!plain || content.substr(0, content.find("IDAT")).find("tRNS") != std::string_view::npos) {
        // Pillow resizes these in the mode that they are stored in, by other rules
        throw InputError(
            "a PNG with a palette, grey with alpha, a transparent colour or other depths than 8 bits; convert it "
            "to 8-bit RGB, RGBA or grey");
    }
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    struct Guard {
        png_image& of;
        ~Guard() { png_image_free(&of); }
    } const guard{image};
    if (png_image_begin_read_from_memory(&image, content.data(), content.size()) == 0) {
        throw InputError(std::string("damaged PNG (") + image.message + ")");
    }
    image.format = kind == 0 ? PNG_FORMAT_GRAY : kind == 2 ? PNG_FORMAT_RGB : PNG_FORMAT_RGBA;
    image.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;
    Decoded made;
    allocate(made, image.width, image.height, kind == 0 ? Order::grey : kind == 2 ? Order::rgb : Order::rgba);
    if (png_image_finish_read(&image, nullptr, made.bytes.data(), 0, nullptr) == 0) {
        throw InputError(std::string("damaged PNG (") + image.message + ")");
    }
    return made;
}
#endif

#ifdef INVARICLIP_WEBP
Decoded webp(std::string_view content) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(content.data());
    WebPBitstreamFeatures features{};
    if (const VP8StatusCode status = WebPGetFeatures(bytes, content.size(), &features); status != VP8_STATUS_OK) {
        throw InputError(status == VP8_STATUS_NOT_ENOUGH_DATA ? "damaged WebP (it ends too early)" : "damaged WebP");
    }
    if (features.has_animation != 0) {
        throw InputError("an animated WebP; convert it to a still image");
    }
    const bool alpha = features.has_alpha != 0;
    Decoded made;
    allocate(made, static_cast<std::size_t>(features.width), static_cast<std::size_t>(features.height),
             alpha ? Order::rgba : Order::rgb);
    const int stride = static_cast<int>(made.width * channels_of(made.order));
    const auto decode = alpha ? WebPDecodeRGBAInto : WebPDecodeRGBInto;
    if (decode(bytes, content.size(), made.bytes.data(), made.bytes.size(), stride) == nullptr) {
        throw InputError("damaged WebP (it ends too early, or its content cannot be read)");
    }
    return made;
}
#endif

}  // namespace

Decoded decode(std::string_view content) {
    const auto begins = [&](std::string_view with) { return content.substr(0, with.size()) == with; };
    if (begins("P5") || begins("P6")) {
        return netpbm(content);
    }
#ifdef INVARICLIP_JPEG
    if (begins("\xFF\xD8\xFF")) {
        return jpeg(content);
    }
#endif
#ifdef INVARICLIP_PNG
    if (begins("\x89PNG\r\n\x1A\n")) {
        return png(content);
    }
#endif
#ifdef INVARICLIP_WEBP
    if (begins("RIFF") && content.size() >= 12 && content.substr(8, 4) == "WEBP") {
        return webp(content);
    }
#endif
    throw InputError("not an image that is read here; known: " + known());
}

Decoded read(const std::string& path) {
    std::error_code unknown;
    if (!std::filesystem::is_regular_file(path, unknown)) {
        throw InputError(path + ": no such file");
    }
    if (std::filesystem::file_size(path, unknown) > max_file_bytes) {
        throw InputError(path + ": larger than 1 GiB");
    }
    std::ifstream file(path, std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) {
        throw InputError(path + ": cannot be read");
    }
    try {
        return decode(content);
    } catch (const InputError& error) {
        throw InputError(path + ": " + error.what());
    }
}

std::string known() {
    std::string names = "PPM, PGM";
#ifdef INVARICLIP_JPEG
    names += ", JPEG";
#endif
#ifdef INVARICLIP_PNG
    names += ", PNG";
#endif
#ifdef INVARICLIP_WEBP
    names += ", WebP";
#endif
    return names;
}

}  // namespace invariclip::images
