// Resize and crop as Pillow does them, bit by bit.
//
// Pillow resizes rows first and columns after (a strip that is more than a hundred times as high as wide, and becomes
// lower, the other way round), each time to 8 bits: a pixel is a sum of products with weights that were rounded to 22
// binary places. Integers add up to the same in any order, so what is free to choose is how to be fast:
// rows go through many at a time, interleaved, so that one weight meets a vector of pixels; and only the columns and
// rows that the crop keeps are computed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "invariclip/invariclip.hpp"

// One binary for old and new processors: GCC and Clang compile the inner loops twice and pick when the program starts.
// Sanitizers cannot run the code that picks; INVARICLIP_PLAIN leaves it out too.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__has_attribute) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(INVARICLIP_PLAIN)
#if __has_attribute(target_clones)
#define INVARICLIP_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef INVARICLIP_CLONES
#define INVARICLIP_CLONES
#endif

#if defined(__GNUC__)
#define INVARICLIP_INLINE inline __attribute__((always_inline))
#else
#define INVARICLIP_INLINE inline
#endif

namespace invariclip {
namespace {

constexpr int precision = 32 - 8 - 2;
constexpr std::int32_t half = 1 << (precision - 1);
// What the weights of one direction may take: a picture of four million columns
constexpr std::size_t max_weights = std::size_t{1} << 24;
// Above this a picture's weights are not kept for the next one of its size
constexpr std::size_t max_kept_weights = std::size_t{1} << 20;
constexpr std::size_t max_kept_sizes = 8;

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) {
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    }
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

double bilinear(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

std::size_t half_even(double value) { return static_cast<std::size_t>(std::nearbyint(value)); }

// One direction of a resize: what every kept output is a sum of.
struct Axis {
    std::size_t size = 0;     // of the input
    std::size_t resized = 0;  // of the whole output
    std::size_t skipped = 0;  // outputs that the crop cuts away in front
    std::size_t kept = 0;     // outputs that are computed
    std::size_t border = 0;   // padding in front
    std::size_t first = 0;    // the inputs that any kept output needs: [first, last)
    std::size_t last = 0;
    std::size_t most = 0;  // taps to an output, as stored
    std::vector<std::size_t> begin;
    std::vector<std::size_t> taps;
    std::vector<std::int32_t> weights;  // [kept, most]

    [[nodiscard]] bool same() const noexcept { return size == resized; }
    [[nodiscard]] const std::int32_t* of(std::size_t place) const noexcept { return weights.data() + place * most; }
};

void place(Axis& axis, std::size_t size, std::size_t resized, std::size_t wanted) {
    axis.size = size;
    axis.resized = resized;
    axis.border = resized < wanted ? (wanted - resized) / 2 : 0;
    axis.skipped = resized > wanted ? half_even(static_cast<double>(resized - wanted) / 2.0) : 0;
    axis.kept = std::min(resized, wanted);
    axis.first = axis.skipped;
    axis.last = axis.skipped + axis.kept;
}

void weigh(Axis& axis, Interpolation interpolation) {
    const bool cubic = interpolation == Interpolation::bicubic;
    const double scale = static_cast<double>(axis.size) / static_cast<double>(axis.resized);
    const double stretch = std::max(scale, 1.0);
    const double support = (cubic ? 2.0 : 1.0) * stretch;
    axis.most = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
    if (axis.most > max_weights / axis.kept) {
        throw InputError("a picture of " + std::to_string(axis.size) + " pixels in one direction is too long to resize");
    }
    axis.begin.assign(axis.kept, 0);
    axis.taps.assign(axis.kept, 0);
    axis.weights.assign(axis.kept * axis.most, 0);
    axis.first = axis.size;
    axis.last = 0;
    std::vector<double> exact(axis.most);
    for (std::size_t out = 0; out < axis.kept; ++out) {
        const double center = (static_cast<double>(out + axis.skipped) + 0.5) * scale;
        const auto low = static_cast<std::int64_t>(center - support + 0.5);
        const auto begin = static_cast<std::size_t>(std::max<std::int64_t>(low, 0));
        const std::size_t end = std::min(static_cast<std::size_t>(center + support + 0.5), axis.size);
        const std::size_t taps = end - begin;
        double sum = 0;
        for (std::size_t tap = 0; tap < taps; ++tap) {
            const double x = (static_cast<double>(tap + begin) - center + 0.5) * (1.0 / stretch);
            exact[tap] = cubic ? bicubic(x) : bilinear(x);
            sum += exact[tap];
        }
        std::int32_t* weights = axis.weights.data() + out * axis.most;
        for (std::size_t tap = 0; tap < taps; ++tap) {
            const double weight = (sum != 0.0 ? exact[tap] / sum : exact[tap]) * (1 << precision);
            weights[tap] = static_cast<std::int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        axis.begin[out] = begin;
        axis.taps[out] = taps;
        axis.first = std::min(axis.first, begin);
        axis.last = std::max(axis.last, end);
    }
}

struct Plan {
    std::size_t width = 0;
    std::size_t height = 0;
    std::uint64_t used = 0;  // when; the least recently used goes first
    Axis across;
    Axis down;
    bool columns_first = false;

    [[nodiscard]] bool same() const noexcept { return across.same() && down.same(); }
    [[nodiscard]] std::size_t weights() const noexcept { return across.weights.size() + down.weights.size(); }
};

void require_bearable(std::size_t width, std::size_t height, double new_width, double new_height) {
    const double grown = new_width * new_height;
    if (grown > static_cast<double>(max_picture_pixels)) {
        throw InputError("a picture of " + std::to_string(width) + "x" + std::to_string(height) + " becomes " +
                         std::to_string(static_cast<std::uint64_t>(grown)) + " pixels when it is fitted, above the limit of " +
                         std::to_string(max_picture_pixels) + "; crop it");
    }
}

void plan(Plan& to, const PixelSpec& spec, std::size_t width, std::size_t height) {
    const auto w = static_cast<double>(width);
    const auto h = static_cast<double>(height);
    const auto wanted_w = static_cast<double>(spec.width);
    const auto wanted_h = static_cast<double>(spec.height);
    double new_w = wanted_w;
    double new_h = wanted_h;
    Interpolation interpolation = spec.interpolation;
    if (spec.resize_mode == ResizeMode::shortest && spec.width == spec.height) {
        const double longer = std::trunc(wanted_h * std::max(w, h) / std::min(w, h));
        (width <= height ? new_h : new_w) = longer;
        require_bearable(width, height, new_w, new_h);
    } else if (spec.resize_mode != ResizeMode::squash) {
        const bool longest = spec.resize_mode == ResizeMode::longest;
        const double ratio = longest ? std::max(h / wanted_h, w / wanted_w) : std::min(h / wanted_h, w / wanted_w);
        new_w = std::max(1.0, std::nearbyint(w / ratio));
        new_h = std::max(1.0, std::nearbyint(h / ratio));
        require_bearable(width, height, new_w, new_h);
        if (!longest) {
            interpolation = Interpolation::bicubic;  // open_clip 3.3 drops the configured one for a tower not square
        }
    }
    to.width = width;
    to.height = height;
    place(to.across, width, static_cast<std::size_t>(new_w), spec.width);
    place(to.down, height, static_cast<std::size_t>(new_h), spec.height);
    for (Axis* axis : {&to.across, &to.down}) {
        if (!axis->same()) {
            weigh(*axis, interpolation);
        }
    }
    to.columns_first = height > width * 100 && to.down.resized < height;
    if (!to.across.same() && !to.columns_first) {  // what lies between the two passes
        require_bearable(width, height, static_cast<double>(to.across.kept),
                         static_cast<double>(to.down.last - to.down.first));
    }
}

// Rows `apart` bytes from one another; the first byte is that of the first column and row which the crop needs.
struct View {
    const std::uint8_t* data;
    std::size_t apart;
};

inline std::uint8_t clipped(std::int32_t sum) {
    return static_cast<std::uint8_t>(std::clamp(sum >> precision, 0, 255));
}

// Rows that go through the first pass together: as many as make whole vectors of 32 channels, which is what a compiler
// needs to use all of a register.
template <std::size_t channels>
constexpr std::size_t rows_at_once = channels == 4 ? 8 : 32;
template <std::size_t channels>
constexpr std::size_t lanes = channels * rows_at_once<channels>;

// Every kept output of all lanes; block: [taps from axis.first on, width], out: [kept, width].
template <std::size_t width>
INVARICLIP_INLINE void sum_block(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    for (std::size_t place = 0; place < axis.kept; ++place, out += width) {
        const std::int32_t* weights = axis.of(place);
        const std::uint8_t* from = block + (axis.begin[place] - axis.first) * width;
        const std::size_t taps = axis.taps[place];
        std::int32_t sums[width];
        for (std::size_t lane = 0; lane < width; ++lane) {
            sums[lane] = half;
        }
        for (std::size_t tap = 0; tap < taps; ++tap) {
            for (std::size_t lane = 0; lane < width; ++lane) {
                sums[lane] += weights[tap] * from[tap * width + lane];
            }
        }
        for (std::size_t lane = 0; lane < width; ++lane) {
            out[lane] = clipped(sums[lane]);
        }
    }
}

INVARICLIP_CLONES void sum_grey(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    sum_block<lanes<1>>(block, axis, out);
}
INVARICLIP_CLONES void sum_three(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    sum_block<lanes<3>>(block, axis, out);
}
INVARICLIP_CLONES void sum_four(const std::uint8_t* block, const Axis& axis, std::uint8_t* out) {
    sum_block<lanes<4>>(block, axis, out);
}

// One row of the second pass: rows `stride` apart, weighted and added.
INVARICLIP_CLONES void sum_rows(const std::uint8_t* rows, std::size_t stride, std::size_t bytes, const std::int32_t* weights,
                                std::size_t taps, std::int32_t* sums, std::uint8_t* out) {
    for (std::size_t place = 0; place < bytes; ++place) {
        sums[place] = half;
    }
    for (std::size_t tap = 0; tap < taps; ++tap) {
        const std::uint8_t* row = rows + tap * stride;
        const std::int32_t weight = weights[tap];
        for (std::size_t place = 0; place < bytes; ++place) {
            sums[place] += weight * row[place];
        }
    }
    for (std::size_t place = 0; place < bytes; ++place) {
        out[place] = clipped(sums[place]);
    }
}

// Columns of all rows, side by side. A run of columns at a time, row by row: rows whose distance is a power of two would
// otherwise push one another out of the cache.
template <std::size_t channels>
void interleave(const std::uint8_t* const* rows, std::size_t columns, std::uint8_t* block) {
    constexpr std::size_t together = rows_at_once<channels>;
    constexpr std::size_t run = 64;
    for (std::size_t begin = 0; begin < columns; begin += run) {
        const std::size_t end = std::min(begin + run, columns);
        for (std::size_t row = 0; row < together; ++row) {
            std::uint8_t* to = block + (begin * together + row) * channels;
            const std::uint8_t* from = rows[row] + begin * channels;
            std::size_t column = begin;
            if (channels == 3 && row + 1 < together) {
                // four bytes are copied faster than three; the next row writes over the fourth
                for (; column + 1 < end; ++column, from += channels, to += lanes<channels>) {
                    std::memcpy(to, from, 4);
                }
            }
            for (; column < end; ++column, from += channels, to += lanes<channels>) {
                std::memcpy(to, from, channels);
            }
        }
    }
}

// round(a * b / 255), as Pillow rounds it
inline std::uint8_t share(unsigned value, unsigned alpha) {
    const unsigned product = value * alpha + 128;
    return static_cast<std::uint8_t>((product + (product >> 8)) >> 8);
}

// The last step of a row: channels as they were resized to RGB.
void finish(const std::uint8_t* row, std::size_t columns, Order order, bool premultiplied, std::uint8_t* out) {
    const std::size_t channels = channels_of(order);
    const bool turned = order == Order::bgr || order == Order::bgra;
    if (order == Order::rgb) {
        std::memcpy(out, row, columns * 3);
        return;
    }
    for (std::size_t column = 0; column < columns; ++column, row += channels, out += 3) {
        if (order == Order::grey) {
            out[0] = out[1] = out[2] = row[0];
            continue;
        }
        std::uint8_t first = row[0];
        std::uint8_t second = row[1];
        std::uint8_t third = row[2];
        if (premultiplied && row[3] != 0 && row[3] != 255) {
            first = static_cast<std::uint8_t>(std::min(255U * first / row[3], 255U));
            second = static_cast<std::uint8_t>(std::min(255U * second / row[3], 255U));
            third = static_cast<std::uint8_t>(std::min(255U * third / row[3], 255U));
        }
        out[0] = turned ? third : first;
        out[1] = second;
        out[2] = turned ? first : third;
    }
}

std::size_t require_readable(const Image& image) {
    const std::size_t channels = channels_of(image.order);
    if (image.data == nullptr || image.width == 0 || image.height == 0) {
        throw InputError("a picture of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                         " pixels has nothing to see; give its data, width and height");
    }
    if (image.width > max_picture_pixels / image.height) {
        throw InputError("a picture of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                         " is above the limit of " + std::to_string(max_picture_pixels) + " pixels; crop it");
    }
    const std::size_t least = image.width * channels;
    const std::size_t stride = image.stride == 0 ? least : image.stride;
    if (stride < least || stride > std::numeric_limits<std::size_t>::max() / image.height) {
        throw InputError("a picture's rows are " + std::to_string(stride) + " bytes apart, but hold " +
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

    const Plan& plan_of(std::size_t width, std::size_t height) {
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
        Plan made;
        plan(made, spec, width, height);
        made.used = clock;
        plans.push_back(std::move(made));
        return plans.back();
    }

    View premultiplied(View from, std::size_t columns, std::size_t rows) {
        alpha.resize(rows * columns * 4);
        std::uint8_t* to = alpha.data();
        for (std::size_t row = 0; row < rows; ++row) {
            const std::uint8_t* in = from.data + row * from.apart;
            for (std::size_t column = 0; column < columns; ++column, in += 4, to += 4) {
                to[0] = share(in[0], in[3]);
                to[1] = share(in[1], in[3]);
                to[2] = share(in[2], in[3]);
                to[3] = in[3];
            }
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
            if constexpr (channels == 1) {
                sum_grey(block.data(), axis, summed.data());
            } else if constexpr (channels == 3) {
                sum_three(block.data(), axis, summed.data());
            } else {
                sum_four(block.data(), axis, summed.data());
            }
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
        const Plan& plan = plan_of(image.width, image.height);
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

const PixelSpec& Pixels::spec() const noexcept { return work_->spec; }

void Pixels::fit(const Image& image, std::uint8_t* out) {
    const std::size_t stride = require_readable(image);
    switch (channels_of(image.order)) {
        case 1: work_->fit<1>(image, stride, out); break;
        case 3: work_->fit<3>(image, stride, out); break;
        default: work_->fit<4>(image, stride, out); break;
    }
}

}  // namespace invariclip
