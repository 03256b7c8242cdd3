// A site's file, and the shift that its sums come to: as Python's `invariclip.sites.site`, in the same order, so in the same
// bits.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <locale>
#include <sstream>

#include "invariclip/invariclip.hpp"
#include "json.hpp"
#include "seal.hpp"
#include "sha256.hpp"

namespace invariclip {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t site_schema = 3;
constexpr std::size_t max_site_bytes = std::size_t{1} << 24;
constexpr std::size_t max_header_bytes = std::size_t{1} << 22;
constexpr std::size_t max_images = std::size_t{1} << 53;
constexpr std::size_t length_bytes = 8;
constexpr const char* metadata_name = "__metadata__";
constexpr const char* site_key = "invariclip.site";
constexpr std::array<const char*, 3> sums{"total", "taken_for", "training_mean"};
constexpr std::array<const char*, 6> known_facts{"file_sha256", "schema", "name", "space_id", "images", "provenance"};
// As in Python, which says what they are
constexpr double prior = 10.0;
constexpr double per_kind = 5.0;
constexpr double largest_shift = 0.95;
constexpr double tolerance = 1e-4;

using Vector = std::vector<double>;

[[noreturn]] void no_site(const std::string& why) {
    throw SiteError("not a site written by `invariclip adapt` (" + why + ")");
}

std::uint64_t little_endian(std::string_view bytes) {
    std::uint64_t value = 0;
    for (std::size_t place = 0; place < length_bytes; ++place) {
        value |= std::uint64_t{static_cast<unsigned char>(bytes[place])} << 8 * place;
    }
    return value;
}

// Where a tensor lies among the bytes behind the header.
struct Span {
    std::size_t begin = 0;
    std::size_t end = 0;
};

Span span_of(const json::Value& plain, const std::string& name) {
    if (plain.at("dtype").text("dtype") != "F64") {
        throw SiteError("its sums are not float64");
    }
    const json::Array& shape = plain.at("shape").array("shape");
    const json::Array& offsets = plain.at("data_offsets").array("data_offsets");
    if (shape.size() != 1 || offsets.size() != 2) {
        no_site("'" + name + "' is not one vector");
    }
    const std::size_t count = shape[0].count("shape", 0, max_site_bytes);
    const Span span{offsets[0].count("data_offsets", 0, max_site_bytes),
                    offsets[1].count("data_offsets", 0, max_site_bytes)};
    if (span.end < span.begin || span.end - span.begin != count * sizeof(double)) {
        no_site("'" + name + "' does not take as many bytes as its shape says");
    }
    return span;
}

// Every byte belongs to one tensor, as safetensors has it.
void require_tiled(std::array<Span, sums.size()> spans, std::size_t bytes) {
    std::sort(spans.begin(), spans.end(),
              [](const Span& one, const Span& other) { return one.begin + one.end < other.begin + other.end; });
    std::size_t reached = 0;
    for (const Span& span : spans) {
        if (span.begin != reached) {
            no_site("its sums overlap or leave gaps");
        }
        reached = span.end;
    }
    if (reached != bytes) {
        no_site("its sums take " + std::to_string(reached) + " bytes, and it holds " + std::to_string(bytes));
    }
}

Vector vector_of(std::string_view data, const Span& span) {
    Vector values((span.end - span.begin) / sizeof(double));
    for (std::size_t place = 0; place < values.size(); ++place) {
        const std::uint64_t bits = little_endian(data.substr(span.begin + place * sizeof(double)));
        std::memcpy(&values[place], &bits, sizeof bits);
    }
    return values;
}

bool finite(const Vector& values) {
    return std::all_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); });
}

// Of `count` values, added from the first to the last, as in Python.
template <typename Value>
double length_of(std::size_t count, Value value) {
    double sum = 0;
    for (std::size_t place = 0; place < count; ++place) {
        const double one = value(place);
        sum += one * one;
    }
    return std::sqrt(sum);
}

double length_of(const Vector& values) {
    return length_of(values.size(), [&](std::size_t place) { return values[place]; });
}

struct Sums {
    Vector total;
    Vector taken_for;
    Vector training_mean;
};

// Refuses sums that no unit embeddings have.
void require_possible(const Sums& given, std::size_t images) {
    if (given.total.size() != given.training_mean.size() || given.total.empty()) {
        throw SiteError("a site has two vectors of one width, not [" + std::to_string(given.total.size()) + "] and [" +
                        std::to_string(given.training_mean.size()) + "]");
    }
    if (!finite(given.total) || !finite(given.training_mean)) {
        throw SiteError("a site's sums have values that are not finite; measure it again");
    }
    const auto possible = [](double share) { return share >= 0; };  // a NaN is not
    if (given.taken_for.empty() || !std::all_of(given.taken_for.begin(), given.taken_for.end(), possible)) {
        throw SiteError("a site's classes have impossible shares; measure it again");
    }
    const auto count = static_cast<double>(images);
    double shares = 0;
    for (const double share : given.taken_for) {
        shares += share;
    }
    if (!(std::fabs(shares - count) <= 1e-3 * std::max(1.0, count))) {
        throw SiteError("a site's classes do not add up to its images; measure it again");
    }
    if (length_of(given.total) > count * (1 + tolerance) || length_of(given.training_mean) > 1 + tolerance) {
        throw SiteError("a site's sums are longer than unit embeddings can make them; measure it again");
    }
}

double kinds_of(const Vector& taken_for, double images) {
    double sum = 0;
    for (const double value : taken_for) {
        const double share = value / std::max(1.0, images);
        if (share > 0) {
            sum += share * std::log(share);
        }
    }
    return std::exp(-sum);
}

std::string digest_of(const std::string& space_id, const std::vector<float>& shift) {
    std::string bytes = space_id + ":";
    for (const float value : shift) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        for (int byte = 0; byte < 4; ++byte) {
            bytes.push_back(static_cast<char>(bits >> 8 * byte & 0xFFU));
        }
    }
    return sha256_of(bytes);
}

std::string two_digits(double value) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out << std::fixed << std::setprecision(2) << value;
    return out.str();
}

std::string content(const std::string& path) {
    const fs::path where(path);
    std::error_code unknown;
    if (!fs::is_regular_file(where, unknown)) {
        throw SiteError("no such file; `invariclip adapt` writes a site");
    }
    const std::uintmax_t bytes = fs::file_size(where, unknown);
    if (unknown || bytes > max_site_bytes) {
        throw SiteError(unknown ? "cannot be read" : "larger than a site can be (" + std::to_string(bytes) + " bytes)");
    }
    std::string read(static_cast<std::size_t>(bytes), '\0');
    std::ifstream file(where, std::ios::binary);
    if (!file.read(read.data(), static_cast<std::streamsize>(read.size()))) {
        throw SiteError("cannot be read");
    }
    return read;
}

// The header's JSON, and what lies behind it.
std::pair<std::string_view, std::string_view> parted(std::string_view bytes) {
    if (bytes.size() > max_site_bytes) {
        throw SiteError("larger than a site can be (" + std::to_string(bytes.size()) + " bytes)");
    }
    if (bytes.size() < length_bytes) {
        no_site("it ends too early");
    }
    const std::uint64_t length = little_endian(bytes);
    if (length > max_header_bytes || length > bytes.size() - length_bytes) {
        no_site("its header of " + std::to_string(length) + " bytes is longer than the file or " +
                std::to_string(max_header_bytes));
    }
    return {bytes.substr(length_bytes, static_cast<std::size_t>(length)),
            bytes.substr(length_bytes + static_cast<std::size_t>(length))};
}

}  // namespace

Site Site::read(const std::string& path) {
    try {
        return parse(content(path));
    } catch (const SiteError& error) {
        throw SiteError(path + ": " + error.what());
    }
}

Site Site::parse(std::string_view bytes) {
    const auto [text, data] = parted(bytes);
    Site site;
    Sums given;
    try {
        const json::Value header = json::parse(text);
        const json::Value facts = json::parse(header.at(metadata_name).at(site_key).text(site_key));
        const std::size_t schema = facts.at("schema").count("schema", 0, 1'000'000);
        if (schema != site_schema) {
            throw SiteError("schema " + std::to_string(schema) + " is not known; this version reads " +
                            std::to_string(site_schema) + ": measure again");
        }
        site.name_ = facts.at("name").text("name");
        site.space_id_ = facts.at("space_id").text("space_id");
        site.images_ = facts.at("images").count("images", 0, max_images);
        static_cast<void>(facts.at("provenance").object("provenance"));
        for (const auto& member : facts.object("facts")) {
            const auto known = [&](const char* name) { return member.first == name; };
            if (std::none_of(known_facts.begin(), known_facts.end(), known)) {
                no_site("its facts hold " + json::quoted(member.first) + ", which is not known");
            }
        }
        for (const auto& member : header.object("the header")) {
            const auto known = [&](const char* name) { return member.first == name; };
            if (member.first != metadata_name && std::none_of(sums.begin(), sums.end(), known)) {
                no_site("it holds a tensor that no site has");
            }
        }
        std::array<Span, sums.size()> spans;
        for (std::size_t place = 0; place < sums.size(); ++place) {
            spans[place] = span_of(header.at(sums[place]), sums[place]);
        }
        require_tiled(spans, data.size());
        given = {vector_of(data, spans[0]), vector_of(data, spans[1]), vector_of(data, spans[2])};
        require_whole(bytes);
    } catch (const ArtifactError& error) {
        no_site(error.what());
    }
    require_possible(given, site.images_);
    const auto count = static_cast<double>(site.images_);
    site.kinds_ = kinds_of(given.taken_for, count);
    const double effective = std::min(count, per_kind * std::max(0.0, site.kinds_ - 1));
    site.weight_ = effective / (effective + prior);
    site.shift_.reserve(given.total.size());
    for (std::size_t place = 0; place < given.total.size(); ++place) {
        const double mean = site.images_ == 0 ? given.training_mean[place] : given.total[place] / count;
        site.shift_.push_back(static_cast<float>(site.weight_ * (mean - given.training_mean[place])));
    }
    const double length = length_of(Vector(site.shift_.begin(), site.shift_.end()));
    if (length > largest_shift) {
        throw SiteError("the site " + json::quoted(site.name_) + " lies " + two_digits(length) +
                        " from the calibrated images, and " + two_digits(largest_shift) +
                        " can be taken away: are these images, and are they prepared for this model?");
    }
    site.sha256_ = digest_of(site.space_id_, site.shift_);
    return site;
}

void Site::apply(float* embedding) const noexcept {
    const auto moved = [&](std::size_t place) {
        return static_cast<double>(embedding[place]) - static_cast<double>(shift_[place]);
    };
    const double length = length_of(shift_.size(), moved);
    for (std::size_t place = 0; place < shift_.size(); ++place) {
        embedding[place] = static_cast<float>(moved(place) / length);
    }
}

}  // namespace invariclip
