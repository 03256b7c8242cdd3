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

// FIPS 180-4, 4.2.2 and 5.3.3
constexpr std::array<std::uint32_t, rounds> round_constants{{
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
}};
constexpr std::array<std::uint32_t, 8> first_state{{
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
}};

constexpr std::uint32_t turned(std::uint32_t word, int by) { return word >> by | word << (32 - by); }

void absorb(std::array<std::uint32_t, 8>& state, const std::uint8_t* block) {
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
                                  round_constants[place] + word[place];
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
                     std::uint64_t total) {
    std::array<std::uint8_t, 2 * block_bytes> end{};
    std::copy_n(rest, count, end.begin());
    end[count] = 0x80;
    const std::size_t length = count + 9 <= block_bytes ? block_bytes : 2 * block_bytes;
    for (std::size_t byte = 0; byte < 8; ++byte) {
        end[length - 1 - byte] = static_cast<std::uint8_t>(total * 8 >> 8 * byte);
    }
    for (std::size_t begin = 0; begin < length; begin += block_bytes) {
        absorb(state, end.data() + begin);
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
    std::ifstream file(path, std::ios::binary);
    std::vector<char> piece(1 << 20);
    std::array<std::uint32_t, 8> state = first_state;
    std::uint64_t total = 0;
    std::size_t rest = 0;  // bytes of `piece` that no block was made of
    while (file) {
        file.read(piece.data() + rest, static_cast<std::streamsize>(piece.size() - rest));
        const auto got = static_cast<std::size_t>(file.gcount());
        total += got;
        const std::size_t whole = (rest + got) / block_bytes * block_bytes;
        for (std::size_t begin = 0; begin < whole; begin += block_bytes) {
            absorb(state, reinterpret_cast<const std::uint8_t*>(piece.data()) + begin);
        }
        rest = rest + got - whole;
        std::memmove(piece.data(), piece.data() + whole, rest);
    }
    if (!file.eof()) {
        throw ArtifactError(path + ": cannot be read");
    }
    return finished(state, reinterpret_cast<const std::uint8_t*>(piece.data()), rest, total);
}

std::string sha256_of(std::string_view bytes) {
    std::array<std::uint32_t, 8> state = first_state;
    const auto* from = reinterpret_cast<const std::uint8_t*>(bytes.data());
    const std::size_t whole = bytes.size() / block_bytes * block_bytes;
    for (std::size_t begin = 0; begin < whole; begin += block_bytes) {
        absorb(state, from + begin);
    }
    return finished(state, from + whole, bytes.size() - whole, bytes.size());
}

}  // namespace invariclip
