#include "sha256.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <vector>

#include "invariclip/invariclip.hpp"

namespace invariclip {
namespace {

constexpr std::size_t block_bytes = 64;
constexpr std::size_t rounds = 64;

// The first 32 binary places of the roots of the first primes are the algorithm's constants. Long double does not hold
// the cube roots everywhere, so they are found in whole numbers.
constexpr std::uint32_t root_places(std::uint64_t prime, int power) {
    // the largest r with r^power <= prime * 2^(32 * power), less its whole part; bit by bit, in 128-bit steps by hand
    std::uint64_t root = 0;
    for (int bit = 36; bit >= 0; --bit) {
        const std::uint64_t tried = root | std::uint64_t{1} << bit;
        // compare tried^power with prime << (32 * power), in limbs of 32 bits
        std::uint32_t product[5] = {1, 0, 0, 0, 0};
        for (int step = 0; step < power; ++step) {
            std::uint32_t next[5] = {0, 0, 0, 0, 0};
            for (int part = 0; part < 2; ++part) {
                const std::uint64_t factor = part == 0 ? tried & 0xFFFFFFFFU : tried >> 32;
                std::uint64_t carry = 0;
                for (int limb = 0; limb + part < 5; ++limb) {
                    carry += product[limb] * factor + next[limb + part];
                    next[limb + part] = static_cast<std::uint32_t>(carry);
                    carry >>= 32;
                }
            }
            for (int limb = 0; limb < 5; ++limb) {
                product[limb] = next[limb];
            }
        }
        bool larger = false;
        bool decided = false;
        for (int limb = 4; limb >= 0 && !decided; --limb) {
            const std::uint32_t wanted = limb == power ? static_cast<std::uint32_t>(prime) : 0;
            decided = product[limb] != wanted;
            larger = product[limb] > wanted;
        }
        root = decided && larger ? root : tried;
    }
    return static_cast<std::uint32_t>(root);
}

struct Constants {
    std::array<std::uint32_t, rounds> round{};
    std::array<std::uint32_t, 8> start{};
};

Constants found_constants() {
    Constants made;
    std::size_t found = 0;
    for (std::uint64_t number = 2; found < rounds; ++number) {
        bool prime = true;
        for (std::uint64_t divisor = 2; divisor * divisor <= number; ++divisor) {
            prime = prime && number % divisor != 0;
        }
        if (prime) {
            made.round[found] = root_places(number, 3);
            if (found < made.start.size()) {
                made.start[found] = root_places(number, 2);
            }
            ++found;
        }
    }
    return made;
}

const Constants& constants() {
    static const Constants known = found_constants();
    return known;
}

constexpr std::uint32_t turned(std::uint32_t word, int by) { return word >> by | word << (32 - by); }

void absorb(std::array<std::uint32_t, 8>& state, const std::uint8_t* block, const Constants& known) {
    std::array<std::uint32_t, rounds> word{};
    for (std::size_t place = 0; place < 16; ++place) {
        const std::uint8_t* from = block + place * 4;
        word[place] =
            std::uint32_t{from[0]} << 24 | std::uint32_t{from[1]} << 16 | std::uint32_t{from[2]} << 8 | from[3];
    }
    for (std::size_t place = 16; place < rounds; ++place) {
        const std::uint32_t near = word[place - 2];
        const std::uint32_t far = word[place - 15];
        word[place] = word[place - 16] + (turned(far, 7) ^ turned(far, 18) ^ far >> 3) + word[place - 7] +
                      (turned(near, 17) ^ turned(near, 19) ^ near >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t place = 0; place < rounds; ++place) {
        const std::uint32_t one = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) +
                                  known.round[place] + word[place];
        const std::uint32_t two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + one;
        d = c;
        c = b;
        b = a;
        a = one + two;
    }
    const std::array<std::uint32_t, 8> mixed{a, b, c, d, e, f, g, h};
    for (std::size_t place = 0; place < state.size(); ++place) {
        state[place] += mixed[place];
    }
}

// What comes behind all whole blocks: the rest of the bytes, and how many there were in all.
std::string finished(std::array<std::uint32_t, 8>& state, const std::uint8_t* rest, std::size_t count,
                     std::uint64_t total, const Constants& known) {
    std::array<std::uint8_t, 2 * block_bytes> end{};
    std::copy_n(rest, count, end.begin());
    end[count] = 0x80;
    const std::size_t length = count + 9 <= block_bytes ? block_bytes : 2 * block_bytes;
    for (std::size_t byte = 0; byte < 8; ++byte) {
        end[length - 1 - byte] = static_cast<std::uint8_t>(total * 8 >> 8 * byte);
    }
    for (std::size_t begin = 0; begin < length; begin += block_bytes) {
        absorb(state, end.data() + begin, known);
    }
    std::string out;
    for (const std::uint32_t word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) {
            out.push_back("0123456789abcdef"[word >> shift & 15U]);
        }
    }
    return out;
}

}  // namespace

std::string sha256_file(const std::string& path) {
    const Constants& known = constants();
    std::ifstream file(path, std::ios::binary);
    std::vector<char> piece(1 << 20);
    std::array<std::uint32_t, 8> state = known.start;
    std::uint64_t total = 0;
    std::size_t rest = 0;  // bytes of `piece` that no block was made of
    while (file) {
        file.read(piece.data() + rest, static_cast<std::streamsize>(piece.size() - rest));
        const auto got = static_cast<std::size_t>(file.gcount());
        total += got;
        const std::size_t whole = (rest + got) / block_bytes * block_bytes;
        for (std::size_t begin = 0; begin < whole; begin += block_bytes) {
            absorb(state, reinterpret_cast<const std::uint8_t*>(piece.data()) + begin, known);
        }
        rest = rest + got - whole;
        std::memmove(piece.data(), piece.data() + whole, rest);
    }
    if (!file.eof()) {
        throw ArtifactError(path + ": cannot be read");
    }
    return finished(state, reinterpret_cast<const std::uint8_t*>(piece.data()), rest, total, known);
}

std::string sha256_of(std::string_view bytes) {
    const Constants& known = constants();
    std::array<std::uint32_t, 8> state = known.start;
    const auto* from = reinterpret_cast<const std::uint8_t*>(bytes.data());
    const std::size_t whole = bytes.size() / block_bytes * block_bytes;
    for (std::size_t begin = 0; begin < whole; begin += block_bytes) {
        absorb(state, from + begin, known);
    }
    return finished(state, from + whole, bytes.size() - whole, bytes.size(), known);
}

}  // namespace invariclip
