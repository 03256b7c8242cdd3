// Resize and crop as Pillow does them, bit by bit.
//
// Pillow resizes rows first and columns after (a strip that is more than a hundred times as high as wide, and becomes
// lower, the other way round), each time to 8 bits: a pixel is a sum of products with weights that were rounded to 22
// binary places. Integers add up to the same in any order, so what is free to choose is how to be fast: rows go through
// many at a time, interleaved, so that one weight meets a vector of pixels; and only the columns and rows that the crop
// keeps are computed.
#include <algorithm>
#include <cstring>
#include <limits>

#include "passes.hpp"

namespace invariclip {
namespace {

// Above this an image's weights are not kept for the next one of its size
constexpr std::size_t max_kept_weights = std::size_t{1} << 20;
constexpr std::size_t max_kept_sizes = 8;

// Rows `apart` bytes from one another; the first byte is that of the first column and row which the crop needs.
struct View {
    const std::uint8_t* data;
    std::size_t apart;
};

std::size_t require_readable(const Image& image) {
    const std::size_t channels = channels_of(image.order);
    if (image.data == nullptr || image.width == 0 || image.height == 0) {
        throw InputError("an image of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                         " pixels has nothing to see; give its data, width and height");
    }
    if (image.width > max_image_pixels / image.height) {
        throw InputError("an image of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                         " is above the limit of " + std::to_string(max_image_pixels) + " pixels; crop it");
    }
    const std::size_t least = image.width * channels;
    const std::size_t stride = image.stride == 0 ? least : image.stride;
    if (stride < least || stride > std::numeric_limits<std::size_t>::max() / image.height) {
        throw InputError("an image's rows are " + std::to_string(stride) + " bytes apart, but hold " +
                         std::to_string(least) + "; give the stride in bytes, or 0 where there is no gap");
    }
    return stride;
}

}  // namespace

struct Pixels::Work {
    PixelSpec spec;
    std::vector<Plan> plans;
    std::uint64_t clock = 0;
    std::vector<std::uint8_t> alpha;   // pixels with alpha premultiplied
    std::vector<std::uint8_t> block;   // some rows, interleaved
    std::vector<std::uint8_t> summed;  // the same, resized
    std::vector<std::uint8_t> wide;    // what the pass over rows gives
    std::vector<std::uint8_t> high;    // what the pass over columns gives
    std::vector<std::int32_t> sums;

    const Plan& planned(std::size_t width, std::size_t height) {
        ++clock;
        for (Plan& known : plans) {
            if (known.width == width && known.height == height) {
                known.used = clock;
                return known;
            }
        }
        plans.erase(std::remove_if(plans.begin(), plans.end(),
                                   [](const Plan& known) { return known.weights() > max_kept_weights; }),
                    plans.end());
        if (plans.size() >= max_kept_sizes) {
            plans.erase(std::min_element(plans.begin(), plans.end(),
                                         [](const Plan& one, const Plan& other) { return one.used < other.used; }));
        }
        plans.push_back(plan_of(spec, width, height));
        plans.back().used = clock;
        return plans.back();
    }

    View premultiplied(View from, std::size_t columns, std::size_t rows) {
        alpha.resize(rows * columns * 4);
        for (std::size_t row = 0; row < rows; ++row) {
            premultiply(from.data + row * from.apart, columns, alpha.data() + row * columns * 4);
        }
        return {alpha.data(), columns * 4};
    }

    // Resizes every row, a few at a time; the last of them stands in for what the last few lack.
    template <std::size_t channels>
    View across(View from, const Axis& axis, std::size_t count) {
        if (axis.same()) {
            return from;
        }
        constexpr std::size_t together = rows_at_once<channels>;
        const std::size_t bytes = axis.kept * channels;
        wide.resize(count * bytes);
        block.resize((axis.last - axis.first) * together * channels);
        summed.resize(bytes * together);
        const std::uint8_t* rows[together];
        for (std::size_t row = 0; row < count; row += together) {
            const std::size_t real = std::min(together, count - row);
            for (std::size_t one = 0; one < together; ++one) {
                rows[one] = from.data + (row + std::min(one, real - 1)) * from.apart;
            }
            interleave<channels>(rows, axis.last - axis.first, block.data());
            sum_columns<channels>(block.data(), axis, summed.data());
            for (std::size_t one = 0; one < real; ++one) {
                const std::uint8_t* in = summed.data() + one * channels;
                std::uint8_t* to = wide.data() + (row + one) * bytes;
                for (std::size_t column = 0; column < axis.kept; ++column) {
                    std::memcpy(to + column * channels, in + column * together * channels, channels);
                }
            }
        }
        return {wide.data(), bytes};
    }

    View down(View from, const Axis& axis, std::size_t bytes) {
        if (axis.same()) {
            return from;
        }
        high.resize(axis.kept * bytes);
        sums.resize(bytes);
        for (std::size_t row = 0; row < axis.kept; ++row) {
            sum_rows(from.data + (axis.begin[row] - axis.first) * from.apart, from.apart, bytes, axis.of(row),
                     axis.taps[row], sums.data(), high.data() + row * bytes);
        }
        return {high.data(), bytes};
    }

    template <std::size_t channels>
    void fit(const Image& image, std::size_t stride, std::uint8_t* out) {
        const Plan& plan = planned(image.width, image.height);
        const std::size_t columns = plan.across.last - plan.across.first;
        const std::size_t rows = plan.down.last - plan.down.first;
        const bool with_alpha = channels == 4 && !plan.same();
        View view{image.data + plan.down.first * stride + plan.across.first * channels, stride};
        if (with_alpha) {
            view = premultiplied(view, columns, rows);
        }
        if (plan.columns_first) {
            view = across<channels>(down(view, plan.down, columns * channels), plan.across, plan.down.kept);
        } else {
            view = down(across<channels>(view, plan.across, rows), plan.down, plan.across.kept * channels);
        }
        if (plan.across.kept < spec.width || plan.down.kept < spec.height) {
            std::memset(out, spec.fill_color, spec.bytes());
        }
        out += (plan.down.border * spec.width + plan.across.border) * 3;
        for (std::size_t row = 0; row < plan.down.kept; ++row, out += spec.width * 3) {
            finish(view.data + row * view.apart, plan.across.kept, image.order, with_alpha, out);
        }
    }
};

Pixels::Pixels(const PixelSpec& spec) : work_(std::make_unique<Work>()) {
    if (spec.height < 1 || spec.height > 4096 || spec.width < 1 || spec.width > 4096) {
        throw InputError("an image_size of " + std::to_string(spec.height) + "x" + std::to_string(spec.width) +
                         " is not a height and a width from 1 to 4096");
    }
    work_->spec = spec;
    work_->plans.reserve(max_kept_sizes);
}

Pixels::Pixels(Pixels&&) noexcept = default;
Pixels& Pixels::operator=(Pixels&&) noexcept = default;
Pixels::~Pixels() = default;

Pixels::Work& Pixels::work() const {
    if (work_ == nullptr) {
        throw InputError("these Pixels were moved from; use those that they were moved to");
    }
    return *work_;
}

const PixelSpec& Pixels::spec() const { return work().spec; }

void Pixels::fit(const Image& image, std::uint8_t* out) {
    Work& at_work = work();
    const std::size_t stride = require_readable(image);
    switch (channels_of(image.order)) {
        case 1: at_work.fit<1>(image, stride, out); break;
        case 3: at_work.fit<3>(image, stride, out); break;
        default: at_work.fit<4>(image, stride, out); break;
    }
}

}  // namespace invariclip
