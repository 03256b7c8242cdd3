// Answers a test's questions on standard input, one after the other, so that one process serves a thousand examples.
//
//   pixels HEIGHT WIDTH INTERPOLATION MODE FILL ORDER COLUMNS ROWS STRIDE\n and the image's bytes
//     -> "ok BYTES\n" and RGB, or "InputError TEXT\n"
//   allocations COLUMNS ROWS\n
//     -> "ok NEW MET\n": how often memory is asked for to fit an image of a new size, and of one met before
//   runs ROWS\n        -> "ok rows/bucket ...\n"
//   quoted JSON\n      -> "ok JSON\n": a text read and written again, or "ArtifactError TEXT\n"
//   sha256 PATH\n      -> "ok DIGEST\n"
//   digests COUNT\n and so many bytes
//     -> "ok DIGEST DIGEST INSTRUCTIONS\n": as this processor takes it, in plain C++, and what the first took
//   cleaned BYTES\n and a text
//     -> "ok BYTES\n" and the text as it is before it falls into tokens, or "InputError TEXT\n"
//   tokens ARTIFACT ENGINE BYTES\n and a text; the artifact is opened once
//     -> "ok COUNT CUT\n" and int64 ids
//   texts ARTIFACT ENGINE BATCH COUNT\n and a line for each text
//     -> "ok BYTES CUT\n" and float32 embeddings
//   classes ARTIFACT ENGINE CLASSES TEMPLATES COLUMNS ROWS\n, a line for each class and template, and RGB
//     -> "ok BYTES\n" and float32 probabilities and logits, or an error; then "COUNT\n" warnings, a line each
//   moved ARTIFACT\n  -> "ok COUNT\n": how many members of a Model that was moved from throw InputError; all do
//   metadata PATH\n    -> "ok TEXT\n": what an ONNX file has under "invariclip", or "ArtifactError TEXT\n"
//   decode PATH\n      -> "ok COLUMNS ROWS CHANNELS BYTES\n" and the bytes, or "InputError TEXT\n"
//   bank WIDTH CLASSES PATH\n
//     -> "ok BYTES\n" and an ONNX file's class embeddings, or "ArtifactError TEXT\n"
//   site WIDTH ROWS PATH\n and so many embeddings
//     -> "ok IMAGES KINDS WEIGHT DIGEST BYTES\n", the shift and the embeddings without it, or "SiteError TEXT\n"
//   crowd ARTIFACT ENGINE THREADS CALLERS ROUNDS [SITE]\n
//     -> "ok\n" where as many threads at once get the very answers that one gets alone, else "differs\n"
//   sites ARTIFACT ENGINE SITE SITE\n
//     -> "ok\n" where a model answers as it did, and one with each site otherwise than one with the other, however they
//        were made, else "differs\n"
#include <algorithm>
#include <atomic>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <thread>
#include <tuple>

#include "batching.hpp"
#include "class_bank.hpp"
#include "invariclip/invariclip.hpp"
#include "json.hpp"
#include "onnx_facts.hpp"
#include "images.hpp"
#include "sha256.hpp"
#include "text_cleaning.hpp"
#include "threads.hpp"

extern std::atomic<std::size_t> allocations;  // allocations.cpp

namespace {

using Key = std::tuple<std::size_t, std::size_t, std::string, std::string, int>;

invariclip::Pixels& pixels_of(const Key& key) {
    static std::map<Key, invariclip::Pixels> known;  // kept, so that what is cached of other sizes is tried too
    const auto found = known.find(key);
    if (found != known.end()) {
        return found->second;
    }
    invariclip::PixelSpec spec;
    spec.height = std::get<0>(key);
    spec.width = std::get<1>(key);
    spec.interpolation =
        std::get<2>(key) == "bicubic" ? invariclip::Interpolation::bicubic : invariclip::Interpolation::bilinear;
    spec.resize_mode = std::get<3>(key) == "shortest"  ? invariclip::ResizeMode::shortest
                       : std::get<3>(key) == "longest" ? invariclip::ResizeMode::longest
                                                       : invariclip::ResizeMode::squash;
    spec.fill_color = static_cast<std::uint8_t>(std::get<4>(key));
    return known.emplace(key, invariclip::Pixels(spec)).first->second;
}

std::string pixels(std::istringstream& words) {
    Key key;
    std::string name;
    std::size_t columns = 0;
    std::size_t rows = 0;
    std::size_t stride = 0;
    words >> std::get<0>(key) >> std::get<1>(key) >> std::get<2>(key) >> std::get<3>(key) >> std::get<4>(key) >> name >>
        columns >> rows >> stride;
    const std::map<std::string, invariclip::Order> orders{{"grey", invariclip::Order::grey},
                                                          {"rgb", invariclip::Order::rgb},
                                                          {"bgr", invariclip::Order::bgr},
                                                          {"rgba", invariclip::Order::rgba},
                                                          {"bgra", invariclip::Order::bgra}};
    const invariclip::Order order = orders.at(name);
    std::vector<std::uint8_t> bytes(stride * rows);
    std::cin.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    invariclip::Pixels& fitting = pixels_of(key);
    std::vector<std::uint8_t> out(fitting.spec().bytes());
    fitting.fit({bytes.data(), columns, rows, stride, order}, out.data());
    return "ok " + std::to_string(out.size()) + '\n' + std::string(out.begin(), out.end());
}

std::string allocated(std::istringstream& words) {
    std::size_t columns = 0;
    std::size_t rows = 0;
    words >> columns >> rows;
    std::size_t fresh = 0;
    std::size_t met = 0;
    for (const invariclip::Order order : {invariclip::Order::grey, invariclip::Order::bgr, invariclip::Order::rgba}) {
        invariclip::Pixels fitting{invariclip::PixelSpec{}};
        const std::vector<std::uint8_t> bytes(columns * rows * channels_of(order));
        const std::vector<std::uint8_t> other(channels_of(order) * 9);
        std::vector<std::uint8_t> out(fitting.spec().bytes());
        const std::size_t at_first = allocations;
        fitting.fit({bytes.data(), columns, rows, 0, order}, out.data());
        fresh += allocations - at_first;
        fitting.fit({other.data(), 3, 3, 0, order}, out.data());
        const std::size_t before = allocations;
        fitting.fit({bytes.data(), columns, rows, 0, order}, out.data());
        met += allocations - before;
    }
    return "ok " + std::to_string(fresh) + ' ' + std::to_string(met) + '\n';
}

std::string runs(std::istringstream& words) {
    std::size_t rows = 0;
    words >> rows;
    std::string said = "ok";
    for (const invariclip::Run& run : invariclip::plan_runs(rows)) {
        said += ' ' + std::to_string(run.rows) + '/' + std::to_string(run.bucket);
    }
    return said + '\n';
}

bool same(const invariclip::Answers& one, const invariclip::Answers& other) {
    return one.embeddings.values == other.embeddings.values && one.probabilities.values == other.probabilities.values &&
           one.uncertainty == other.uncertainty;
}

std::string crowd(std::istringstream& words) {
    std::string artifact;
    invariclip::LoadOptions options;
    std::size_t callers = 0;
    std::size_t rounds = 0;
    std::string site;
    words >> artifact >> options.engine >> options.threads >> callers >> rounds >> site;
    invariclip::Model model = invariclip::Model::load(artifact, options);
    if (!site.empty()) {
        model = model.with_site(invariclip::Site::read(site));
    }
    model.warm_up({1, 3});
    std::vector<std::vector<std::uint8_t>> frames(callers);
    std::vector<std::vector<invariclip::Image>> asked(callers);
    std::vector<invariclip::Answers> alone;
    for (std::size_t caller = 0; caller < callers; ++caller) {
        const std::size_t width = 40 + 7 * caller;
        const std::size_t height = 31 + 11 * (caller % 3);
        frames[caller].resize(width * height * 3);
        for (std::size_t place = 0; place < frames[caller].size(); ++place) {
            frames[caller][place] = static_cast<std::uint8_t>(place * (caller + 3) >> 3);
        }
        asked[caller].assign(1 + caller % 3, {frames[caller].data(), width, height});
        alone.push_back(model.answer(asked[caller]));
    }
    std::atomic<bool> differs{false};
    std::vector<std::thread> threads;
    for (std::size_t caller = 0; caller < callers; ++caller) {
        threads.emplace_back([&, caller] {
            for (std::size_t round = 0; round < rounds; ++round) {
                differs = differs || !same(model.answer(asked[caller]), alone[caller]);
            }
        });
    }
    std::for_each(threads.begin(), threads.end(), [](std::thread& one) { one.join(); });
    return differs ? "differs\n" : "ok\n";
}

std::string raw(const std::vector<float>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

std::string bank(std::istringstream& words) {
    std::size_t width = 0;
    std::size_t classes = 0;
    std::string path;
    words >> width >> classes >> path;
    std::ifstream file(path, std::ios::binary);
    const std::string found = raw(invariclip::read_class_bank(file, path, width, classes));
    return "ok " + std::to_string(found.size()) + '\n' + found;
}

std::string site(std::istringstream& words) {
    std::size_t width = 0;
    std::size_t rows = 0;
    std::string path;
    words >> width >> rows >> path;
    std::vector<float> embeddings(rows * width);
    std::cin.read(reinterpret_cast<char*>(embeddings.data()),
                  static_cast<std::streamsize>(embeddings.size() * sizeof(float)));
    const invariclip::Site read = invariclip::Site::read(path);
    if (read.shift().size() != width) {
        return "ok, but of another width\n";
    }
    for (std::size_t row = 0; row < rows; ++row) {
        read.apply(embeddings.data() + row * width);
    }
    const std::string found = raw(read.shift()) + raw(embeddings);
    std::ostringstream said;
    said.precision(17);
    said << "ok " << read.images() << ' ' << read.kinds() << ' ' << read.weight() << ' ' << read.sha256() << ' '
         << found.size() << '\n'
         << found;
    return said.str();
}

std::string sites(std::istringstream& words) {
    std::string artifact;
    invariclip::LoadOptions options;
    std::string first;
    std::string second;
    words >> artifact >> options.engine >> first >> second;
    options.threads = 1;
    const std::vector<std::uint8_t> frame(60 * 50 * 3, 90);
    const invariclip::Image image(frame.data(), 60, 50);
    auto plain = std::make_optional(invariclip::Model::load(artifact, options));
    const invariclip::Answers before = plain->answer(image);
    const invariclip::Model one = plain->with_site(invariclip::Site::read(first));
    const invariclip::Model other = plain->with_site(invariclip::Site::read(second));
    const invariclip::Answers adapted = one.answer(image);
    const bool kept = same(plain->answer(image), before) && !plain->site() && one.site();
    const bool own = !same(adapted, before) && !same(other.answer(image), adapted);
    plain.reset();  // what they share lives on
    const bool again = same(other.with_site(*one.site()).answer(image), adapted) && same(one.answer(image), adapted);
    return kept && own && again ? "ok\n" : "differs\n";
}

std::string digests(std::istringstream& words) {
    std::size_t count = 0;
    words >> count;
    std::string bytes(count, '\0');
    std::cin.read(bytes.data(), static_cast<std::streamsize>(count));
    return "ok " + invariclip::sha256_of(bytes) + ' ' + invariclip::sha256_portable(bytes) + ' ' +
           invariclip::sha256_instructions() + '\n';
}

std::string sent(std::size_t count) {
    std::string bytes(count, '\0');
    std::cin.read(bytes.data(), static_cast<std::streamsize>(count));
    return bytes;
}

std::string cleaned(std::istringstream& words) {
    std::size_t count = 0;
    words >> count;
    const std::string text = sent(count);
    const std::string found =
        invariclip::utf8(invariclip::cleaned(invariclip::code_points(text), invariclip::Cleaning::lower));
    return "ok " + std::to_string(found.size()) + '\n' + found;
}

const invariclip::Model& opened(std::istringstream& words) {
    static std::map<std::string, invariclip::Model> known;
    std::string artifact;
    std::string engine;
    words >> artifact >> engine;
    const std::string key = artifact + ' ' + engine;
    const auto found = known.find(key);
    return found != known.end()
               ? found->second
               : known.emplace(key, invariclip::Model::load(artifact, {engine, "", 1, true})).first->second;
}

std::string tokens(std::istringstream& words) {
    const invariclip::Model& model = opened(words);
    std::size_t count = 0;
    words >> count;
    const invariclip::Tokens found = model.tokenize({sent(count)});
    return "ok " + std::to_string(found.width) + ' ' + std::to_string(found.cut_texts.size()) + '\n' +
           std::string(reinterpret_cast<const char*>(found.ids.data()), found.ids.size() * sizeof(std::int64_t));
}

std::vector<std::string> lines(std::size_t count) {
    std::vector<std::string> made(count);
    for (std::string& line : made) {
        std::getline(std::cin, line);
    }
    return made;
}

std::string texts(std::istringstream& words) {
    const invariclip::Model& model = opened(words);
    std::size_t batch = 0;
    std::size_t count = 0;
    words >> batch >> count;
    const invariclip::TextEmbeddings found = model.embed_texts(lines(count), batch);
    const std::vector<float>& values = found.embeddings.values;
    return "ok " + std::to_string(values.size() * sizeof(float)) + ' ' + std::to_string(found.cut_texts.size()) + '\n' +
           std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::string classes(std::istringstream& words) {
    const invariclip::Model& model = opened(words);
    std::size_t names = 0;
    std::size_t templates = 0;
    std::size_t columns = 0;
    std::size_t rows = 0;
    words >> names >> templates >> columns >> rows;
    const std::vector<std::string> given = lines(names);
    const std::vector<std::string> prompts = lines(templates);
    const std::string frame = sent(columns * rows * 3);
    const invariclip::Model other = model.with_classes(given, prompts);
    const invariclip::Image image(reinterpret_cast<const std::uint8_t*>(frame.data()), columns, rows);
    const invariclip::Answers found = other.answer(image);
    std::string bytes;
    for (const std::vector<float>* values : {&found.probabilities.values, &found.logits.values}) {
        bytes.append(reinterpret_cast<const char*>(values->data()), values->size() * sizeof(float));
    }
    std::string said = "ok " + std::to_string(bytes.size()) + '\n' + bytes;
    said += std::to_string(other.warnings().size() - model.warnings().size()) + ' ' +
            (other.classes() == given ? "same" : "other") + ' ' + other.classify(image).front().label.value() + '\n';
    return said;
}

std::string moved(std::istringstream& words) {
    std::string artifact;
    words >> artifact;
    using invariclip::Model;
    Model model = Model::load(artifact);
    Model taken = std::move(model);
    const std::vector<std::uint8_t> frame(60 * 50 * 3, 90);
    const invariclip::Image image(frame.data(), 60, 50);
    const std::vector<std::function<void(const Model&)>> members{
        [&](const Model& one) { static_cast<void>(one.classify(image)); },
        [&](const Model& one) { static_cast<void>(one.embed(image)); },
        [&](const Model& one) { static_cast<void>(one.answer(image)); },
        [](const Model& one) { static_cast<void>(one.tokenize({"a"})); },
        [](const Model& one) { static_cast<void>(one.embed_texts({"a"})); },
        [](const Model& one) { one.warm_up(); },
        [](const Model& one) { static_cast<void>(one.classes()); },
        [](const Model& one) { static_cast<void>(one.space_id()); },
        [](const Model& one) { static_cast<void>(one.width()); },
        [](const Model& one) { static_cast<void>(one.pixels()); },
        [](const Model& one) { static_cast<void>(one.calibrated_abstain_above()); },
        [](const Model& one) { static_cast<void>(one.site()); },
        [](const Model& one) { static_cast<void>(one.describe()); },
        [](const Model& one) { static_cast<void>(one.warnings()); },
    };
    std::size_t threw = 0;
    for (const auto& member : members) {
        member(taken);
        try {
            member(model);  // NOLINT: it was moved from
        } catch (const invariclip::InputError&) {
            ++threw;
        }
    }
    model = std::move(taken);  // one that was moved from may be assigned to
    static_cast<void>(model.classify(image));
    invariclip::Pixels fitting{invariclip::PixelSpec{}};
    const invariclip::Pixels fits = std::move(fitting);
    for (const auto& use : std::vector<std::function<void()>>{[&] { fitting.fit(image, nullptr); },
                                                              [&] { static_cast<void>(fitting.spec()); }}) {
        try {
            use();
        } catch (const invariclip::InputError&) {
            ++threw;
        }
    }
    return (threw == members.size() + 2 ? "ok " : "wrong ") + std::to_string(threw) + '\n';
}

std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string what;
    words >> what;
    if (what == "pixels") {
        return pixels(words);
    }
    if (what == "allocations") {
        return allocated(words);
    }
    if (what == "threads") {
        return "ok " + std::to_string(invariclip::available_threads()) + '\n';
    }
    if (what == "runs") {
        return runs(words);
    }
    if (what == "crowd") {
        return crowd(words);
    }
    if (what == "bank") {
        return bank(words);
    }
    if (what == "site") {
        return site(words);
    }
    if (what == "sites") {
        return sites(words);
    }
    if (what == "digests") {
        return digests(words);
    }
    if (what == "cleaned") {
        return cleaned(words);
    }
    if (what == "tokens") {
        return tokens(words);
    }
    if (what == "texts") {
        return texts(words);
    }
    if (what == "classes") {
        return classes(words);
    }
    if (what == "moved") {
        return moved(words);
    }
    if (what == "metadata") {
        std::ifstream file(line.substr(9), std::ios::binary);
        return "ok " + invariclip::onnx_metadata(file, "invariclip") + '\n';
    }
    if (what == "decode") {
        const auto image = invariclip::images::read(line.substr(7));
        return "ok " + std::to_string(image.width) + ' ' + std::to_string(image.height) + ' ' +
               std::to_string(invariclip::channels_of(image.order)) + ' ' + std::to_string(image.bytes.size()) + '\n' +
               std::string(image.bytes.begin(), image.bytes.end());
    }
    if (what == "quoted") {
        return "ok " + invariclip::json::quoted(invariclip::json::parse(line.substr(7)).text("it")) + '\n';
    }
    if (what == "sha256") {
        return "ok " + invariclip::sha256_file(line.substr(7)) + '\n';
    }
    return "no such question\n";
}

}  // namespace

int main() {
    std::ios::sync_with_stdio(false);
    for (std::string line; std::getline(std::cin, line);) {
        std::string said;
        try {
            said = answer(line);
        } catch (const invariclip::InputError& error) {
            said = std::string("InputError ") + error.what() + '\n';
        } catch (const invariclip::ArtifactError& error) {
            said = std::string("ArtifactError ") + error.what() + '\n';
        } catch (const invariclip::SiteError& error) {
            said = std::string("SiteError ") + error.what() + '\n';
        }
        std::cout << said << std::flush;
    }
    return 0;
}
