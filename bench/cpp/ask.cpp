// Answers the same frame again and again, and says how long each time took; `compare.py` is its like in Python.
//
//     ask FRAME COLUMNS ROWS OUT pixels SIDE
//     ask FRAME COLUMNS ROWS OUT classify ARTIFACT ENGINE THREADS
//     ask FRAME COLUMNS ROWS OUT load ARTIFACT ENGINE THREADS         the artifact opened, and closed again
//     ask FRAME COLUMNS ROWS OUT unverified ARTIFACT ENGINE THREADS   the same with LoadOptions::verify off
//
// FRAME holds RGB bytes. The first answer goes to OUT as bytes, and an empty JSON object says so. Then each line on
// standard input, {"do": "time", "repetitions": N}, asks for N times, which come back as {"times": [seconds, ...]}: the
// protocol of invariclip/measure/worker.py.
#include <chrono>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "invariclip/invariclip.hpp"

namespace {

using Bytes = std::vector<char>;

void serve(const std::string& out, const std::function<void()>& answer, const std::function<Bytes()>& answered) {
    answer();
    const Bytes bytes = answered();
    std::ofstream(out, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    std::cout << "{}" << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        const std::size_t times = std::stoul(line.substr(line.find_first_of("0123456789")));
        std::cout << "{\"times\": [";
        for (std::size_t time = 0; time < times; ++time) {
            const auto began = std::chrono::steady_clock::now();
            answer();
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
            std::cout << (time ? ", " : "") << took.count();
        }
        std::cout << "]}" << std::endl;
    }
}

template <typename Value>
Bytes bytes_of(const std::vector<Value>& values) {
    const auto* first = reinterpret_cast<const char*>(values.data());
    return {first, first + values.size() * sizeof(Value)};
}

}  // namespace

int main(int count, char** given) {
    const std::vector<std::string> words(given + 1, given + count);
    if (words.size() < 6) {
        return 2;
    }
    try {
        std::ifstream file(words[0], std::ios::binary);
        const std::vector<std::uint8_t> frame{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
        const invariclip::Image image(frame.data(), std::stoul(words[1]), std::stoul(words[2]));
        if (frame.size() != image.width * image.height * 3) {
            return 2;
        }
        if (words[4] == "pixels") {
            invariclip::PixelSpec spec;
            spec.height = spec.width = std::stoul(words[5]);
            invariclip::Pixels pixels(spec);
            std::vector<std::uint8_t> out(spec.bytes());
            serve(words[3], [&] { pixels.fit(image, out.data()); }, [&] { return bytes_of(out); });
        } else if (words[4] == "load" || words[4] == "unverified") {
            const invariclip::LoadOptions options{words.at(6), "", std::stoi(words.at(7)), words[4] == "load"};
            std::string space;
            const auto load = [&] { space = invariclip::Model::load(words[5], options).space_id(); };
            serve(words[3], load, [&] { return Bytes(space.begin(), space.end()); });
        } else {
            const auto model = invariclip::Model::load(words[5], {words.at(6), "", std::stoi(words.at(7))});
            std::vector<invariclip::Prediction> answers;
            serve(
                words[3], [&] { answers = model.classify(image); },
                [&] { return bytes_of(answers.front().probabilities); });
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 2;
    }
    return 0;
}
