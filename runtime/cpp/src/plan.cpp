#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace invariclip {
namespace {

// What the weights of one direction may take: an image of four million columns
constexpr std::size_t max_weights = std::size_t{1} << 24;

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

// A strip of few pixels can grow beyond all memory before it is cropped. Only what the crop keeps is computed here, but
// the bounds are those of Python, where Pillow computes all of it.
void require_bearable(std::size_t width, std::size_t height, double new_width, double new_height,
                      Interpolation interpolation) {
    const auto w = static_cast<double>(width);
    const auto h = static_cast<double>(height);
    const std::string size = "an image of " + std::to_string(width) + "x" + std::to_string(height);
    const auto whole = [](double value) { return std::to_string(static_cast<std::uint64_t>(value)); };
    const bool columns_first = h > 100 * w && new_height < h;
    const double between = columns_first ? w * new_height : new_width != w ? new_width * h : 0.0;
    const double grown = std::max(new_width * new_height, between);
    if (grown > static_cast<double>(max_resized_pixels)) {
        throw InputError(size + " becomes " + whole(grown) + " pixels when it is resized to " + whole(new_width) + "x" +
                         whole(new_height) + ", above the limit of " + std::to_string(max_resized_pixels) +
                         "; crop it to a shape that is less long");
    }
    const double support = interpolation == Interpolation::bicubic ? 2.0 : 1.0;
    const auto too_long = [support](double from, double to) {
        const double taps = 2 * std::ceil(support * std::max(from / to, 1.0)) + 1;
        return from != to && taps * to > static_cast<double>(max_weights);
    };
    if (too_long(w, new_width) || too_long(h, new_height)) {
        throw InputError(size + " is too long to resize to " + whole(new_width) + "x" + whole(new_height) +
                         "; crop it to a shape that is less long");
    }
}

}  // namespace

Plan plan_of(const PixelSpec& spec, std::size_t width, std::size_t height) {
    Plan to;
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
    } else if (spec.resize_mode != ResizeMode::squash) {
        const bool longest = spec.resize_mode == ResizeMode::longest;
        const double ratio = longest ? std::max(h / wanted_h, w / wanted_w) : std::min(h / wanted_h, w / wanted_w);
        new_w = std::max(1.0, std::nearbyint(w / ratio));
        new_h = std::max(1.0, std::nearbyint(h / ratio));
        if (!longest) {
            interpolation = Interpolation::bicubic;  // open_clip 3.3 drops the configured one for a tower not square
        }
    }
    require_bearable(width, height, new_w, new_h, interpolation);
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
    return to;
}

}  // namespace invariclip
