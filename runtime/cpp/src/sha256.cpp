#include "sha256.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include "invariclip/invariclip.hpp"
#include "sha256_blocks.hpp"

namespace invariclip {
namespace {

using sha256::Absorb;
using sha256::block_bytes;
using sha256::State;

// FIPS 180-4, 5.3.3
constexpr State first_state{{
    0x6a09e667,
    0xbb67ae85,
    0x3c6ef372,
    0xa54ff53a,
    0x510e527f,
    0x9b05688c,
    0x1f83d9ab,
    0x5be0cd19,
}};

const std::uint8_t* bytes_of(const char* text) { return reinterpret_cast<const std::uint8_t*>(text); }

// What comes behind all whole blocks: the rest of the bytes, and how many there were in all.
std::string finished(Absorb absorb, State& state, const std::uint8_t* rest, std::size_t count, std::uint64_t total) {
    std::array<std::uint8_t, 2 * block_bytes> end{};
    std::copy_n(rest, count, end.begin());
    end[count] = 0x80;
    const std::size_t length = count + 9 <= block_bytes ? block_bytes : 2 * block_bytes;
    for (std::size_t byte = 0; byte < 8; ++byte) {
        end[length - 1 - byte] = static_cast<std::uint8_t>(total * 8 >> 8 * byte);
    }
    absorb(state, end.data(), length / block_bytes);
    std::string out;
    for (const std::uint32_t word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) {
            out.push_back("0123456789abcdef"[word >> shift & 15U]);
        }
    }
    return out;
}

std::string digest_of(Absorb absorb, std::string_view bytes) {
    State state = first_state;
    const std::size_t whole = bytes.size() / block_bytes;
    absorb(state, bytes_of(bytes.data()), whole);
    const std::string_view rest = bytes.substr(whole * block_bytes);
    return finished(absorb, state, bytes_of(rest.data()), rest.size(), bytes.size());
}

}  // namespace

std::string sha256_file(const std::string& path) {
    const Absorb absorb = sha256::chosen().absorb;
    std::ifstream file(path, std::ios::binary);
    std::vector<char> piece(1 << 20);
    State state = first_state;
    std::uint64_t total = 0;
    std::size_t rest = 0;  // bytes of `piece` that no block was made of
    while (file) {
        file.read(piece.data() + rest, static_cast<std::streamsize>(piece.size() - rest));
        const auto got = static_cast<std::size_t>(file.gcount());
        total += got;
        const std::size_t blocks = (rest + got) / block_bytes;
        absorb(state, bytes_of(piece.data()), blocks);
        rest = rest + got - blocks * block_bytes;
        std::memmove(piece.data(), piece.data() + blocks * block_bytes, rest);
    }
    if (!file.eof()) {
        throw ArtifactError(path + ": cannot be read");
    }
    return finished(absorb, state, bytes_of(piece.data()), rest, total);
}

std::string sha256_of(std::string_view bytes) { return digest_of(sha256::chosen().absorb, bytes); }
std::string sha256_portable(std::string_view bytes) { return digest_of(sha256::absorb_portable, bytes); }
const char* sha256_instructions() noexcept { return sha256::chosen().name; }

}  // namespace invariclip
