// Random and mutated bytes into every reader, built with sanitizers: each may refuse by an Error, none may do more.
// Says how often each understood.
//
//     mutate SEED ROUNDS FILE...     files to begin with: a manifest, ONNX files, a site, images
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <sstream>

#include "artifact.hpp"
#include "class_bank.hpp"
#include "json.hpp"
#include "onnx_facts.hpp"
#include "seal.hpp"
#include "images.hpp"
#include "text_cleaning.hpp"
#include "tokenizer.hpp"

namespace {

using Bytes = std::string;

Bytes content(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

class Mutator {
  public:
    explicit Mutator(unsigned seed) : random_(seed) {}

    std::size_t below(std::size_t bound) { return std::uniform_int_distribution<std::size_t>(0, bound - 1)(random_); }

    Bytes changed(Bytes bytes) {
        for (std::size_t times = 1 + below(4); times > 0; --times) {
            const std::size_t place = bytes.empty() ? 0 : below(bytes.size());
            const std::size_t length = std::min(1 + below(16), bytes.size() - place);
            switch (below(7)) {
                case 0: bytes.insert(place, noise(1 + below(8))); break;
                case 1: bytes.erase(place, length); break;
                case 2: bytes.resize(place); break;
                case 3: bytes.insert(place, bytes.substr(place, length)); break;
                case 4: bytes.replace(place, length, telling[below(std::size(telling))]); break;
                default:
                    if (!bytes.empty()) {
                        bytes[place] = static_cast<char>(below(256));
                    }
            }
        }
        return bytes;
    }

    Bytes noise(std::size_t count) {
        Bytes made(count, '\0');
        std::generate(made.begin(), made.end(), [this] { return static_cast<char>(below(256)); });
        return made;
    }

  private:
    static constexpr const char* telling[] = {"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01",
                                              "[[[[[[[[[[[[[[[[",
                                              "{\"\":{\"\":{\"\":",
                                              "\\ud800",
                                              "1e999",
                                              "-0",
                                              "4294967296",
                                              "18446744073709551616",
                                              "\"",
                                              "null",
                                              "../",
                                              "99999 99999",
                                              "\x72\xFF\xFF\xFF\x7F",
                                              "r\x80\x80\x80\x80\x08"};
    std::mt19937 random_;
};

// With the digest that its content has, so that what is behind the check is met too.
Bytes resealed(Bytes bytes) {
    const std::size_t seal = invariclip::seal_of(bytes);
    return seal == Bytes::npos ? bytes : bytes.replace(seal, 64, invariclip::digest_under_seal(bytes, seal));
}

template <typename Read>
bool understood(Read read) {
    try {
        read();
        return true;
    } catch (const invariclip::Error&) {
        return false;
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) {
        return 2;
    }
    Mutator mutator(static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10)));
    const unsigned long rounds = std::strtoul(arguments[2], nullptr, 10);
    std::vector<Bytes> seeds;
    for (int place = 3; place < count; ++place) {
        seeds.push_back(content(arguments[place]));
    }
    invariclip::PixelSpec spec;
    spec.height = 24;
    spec.width = 32;
    invariclip::Pixels pixels(spec);
    std::vector<std::uint8_t> out(spec.bytes());
    invariclip::TextSpec text_spec;
    text_spec.context_length = 8;
    text_spec.start_token_ids = text_spec.end_token_ids = {1};
    text_spec.clean = "lower";
    std::map<std::string, unsigned long> accepted;
    for (unsigned long round = 0; round < rounds; ++round) {
        const Bytes bytes =
            round % 8 == 0 ? mutator.noise(mutator.below(200)) : mutator.changed(seeds[mutator.below(seeds.size())]);
        accepted["json"] += understood([&] { invariclip::json::parse(bytes); });
        accepted["facts"] += understood([&] { invariclip::read_facts(bytes); });
        understood([&] { invariclip::read_manifest(".", bytes, ""); });  // no: its graph is never there
        accepted["onnx"] += understood([&] {
            std::istringstream file(bytes);
            invariclip::read_facts(invariclip::onnx_metadata(file, "invariclip"));
        });
        accepted["banks"] += understood([&] {
            std::istringstream file(bytes);
            invariclip::read_class_bank(file, "bank.onnx", 8, 2);
        });
        accepted["sites"] += understood([&] {
            const invariclip::Site site = invariclip::Site::parse(resealed(bytes));
            std::vector<float> row(site.shift().size(), 1);
            site.apply(row.data());
        });
        accepted["texts"] += understood([&] {
            const std::u32string clean =
                invariclip::cleaned(invariclip::code_points(bytes), invariclip::Cleaning::lower);
            invariclip::utf8(clean);
        });
        accepted["tokenizers"] += understood([&] {
            const invariclip::Tokenizer tokenizer(bytes, text_spec);
            std::vector<std::int64_t> ids(text_spec.context_length);
            tokenizer.row("two dogs & a caf\u00e9's tea in 1999", ids.data());
        });
        accepted["images"] += understood([&] {
            const auto image = invariclip::images::decode(bytes);
            if (image.bytes.size() < 1 << 22) {  // what is larger takes long and tells no more
                pixels.fit(image.image(), out.data());
            }
        });
        // an image of any size and stride whose last byte is the last that may be read
        const std::size_t width = 1 + mutator.below(70);
        const std::size_t height = 1 + mutator.below(70);
        const auto order = static_cast<invariclip::Order>(mutator.below(5));
        const std::size_t row = width * channels_of(order);
        const std::size_t stride = row + mutator.below(5);
        const Bytes frame = mutator.noise(stride * (height - 1) + row);
        const std::vector<std::uint8_t> exact(frame.begin(), frame.end());
        accepted["frames"] += understood([&] { pixels.fit({exact.data(), width, height, stride, order}, out.data()); });
    }
    for (const auto& [reader, times] : accepted) {
        std::cout << reader << ' ' << times << '\n';
    }
    return 0;
}
