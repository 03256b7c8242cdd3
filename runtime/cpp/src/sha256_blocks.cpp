#include "sha256_blocks.hpp"

#if defined(__GNUC__) && defined(__x86_64__)
#define INVARICLIP_SHA_NI
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__GNUC__) && defined(__aarch64__) && !defined(__AARCH64EB__)
#define INVARICLIP_SHA_ARMV8
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

namespace invariclip::sha256 {
namespace {

constexpr std::uint32_t turned(std::uint32_t word, int by) { return word >> by | word << (32 - by); }

#ifdef INVARICLIP_SHA_NI
#define INVARICLIP_WITH_SHA __attribute__((target("sha,sse4.1,ssse3")))

bool has_sha() noexcept {
    constexpr unsigned ssse3 = 1U << 9;
    constexpr unsigned sse41 = 1U << 19;
    constexpr unsigned sha = 1U << 29;
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & ssse3) == 0 || (ecx & sse41) == 0) {
        return false;
    }
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & sha) != 0;
}

INVARICLIP_WITH_SHA __m128i constants_of(std::size_t round) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(round_constants.data() + round));
}

// The instructions want the state as ABEF and CDGH, its first word in the highest lane, and do two rounds each.
INVARICLIP_WITH_SHA void absorb_fast(State& state, const std::uint8_t* data, std::size_t blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    auto* const words = reinterpret_cast<__m128i*>(state.data());
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xB1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1B);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
    __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
    for (; blocks > 0; --blocks, data += block_bytes) {
        const __m128i abef_before = abef;
        const __m128i cdgh_before = cdgh;
        __m128i word[4];
        for (std::size_t four = 0; four < 4; ++four) {
            word[four] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + four), big_endian);
        }
#pragma GCC unroll 16
        for (std::size_t four = 0; four < 16; ++four) {
            __m128i& now = word[four % 4];
            if (four >= 4) {  // w[t] of w[t-16], w[t-15], w[t-7] and w[t-2], four at a time
                const __m128i last = word[(four + 3) % 4];
                const __m128i seven = _mm_alignr_epi8(last, word[(four + 2) % 4], 4);
                now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, word[(four + 1) % 4]), seven), last);
            }
            const __m128i sum = _mm_add_epi32(now, constants_of(4 * four));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128(words, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(words + 1, _mm_alignr_epi8(dchg, feba, 8));
}
#endif

#ifdef INVARICLIP_SHA_ARMV8
#if defined(__ARM_FEATURE_SHA2)
#define INVARICLIP_WITH_SHA
#elif defined(__clang__)
#define INVARICLIP_WITH_SHA __attribute__((target("sha2")))
#else
#define INVARICLIP_WITH_SHA __attribute__((target("+crypto")))  // as arm_neon.h of GCC 12 has it
#endif

bool has_sha() noexcept {
#if defined(__ARM_FEATURE_SHA2) || defined(__APPLE__)
    return true;
#elif defined(__linux__)
    constexpr unsigned long sha2 = 1UL << 6;  // HWCAP_SHA2
    return (getauxval(AT_HWCAP) & sha2) != 0;
#else
    return false;
#endif
}

INVARICLIP_WITH_SHA void absorb_fast(State& state, const std::uint8_t* data, std::size_t blocks) {
    uint32x4_t abcd = vld1q_u32(state.data());
    uint32x4_t efgh = vld1q_u32(state.data() + 4);
    for (; blocks > 0; --blocks, data += block_bytes) {
        const uint32x4_t abcd_before = abcd;
        const uint32x4_t efgh_before = efgh;
        uint32x4_t word[4];
        for (std::size_t four = 0; four < 4; ++four) {
            word[four] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * four)));
        }
#pragma GCC unroll 16
        for (std::size_t four = 0; four < 16; ++four) {
            uint32x4_t& now = word[four % 4];
            if (four >= 4) {  // w[t] of w[t-16], w[t-15], w[t-7] and w[t-2], four at a time
                now = vsha256su1q_u32(vsha256su0q_u32(now, word[(four + 1) % 4]), word[(four + 2) % 4],
                                      word[(four + 3) % 4]);
            }
            const uint32x4_t sum = vaddq_u32(now, vld1q_u32(round_constants.data() + 4 * four));
            const uint32x4_t abcd_now = abcd;
            abcd = vsha256hq_u32(abcd, efgh, sum);
            efgh = vsha256h2q_u32(efgh, abcd_now, sum);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(state.data(), abcd);
    vst1q_u32(state.data() + 4, efgh);
}
#endif

}  // namespace

void absorb_portable(State& state, const std::uint8_t* data, std::size_t blocks) {
    for (; blocks > 0; --blocks, data += block_bytes) {
        std::array<std::uint32_t, rounds> word{};
        for (std::size_t place = 0; place < 16; ++place) {
            const std::uint8_t* from = data + place * 4;
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
        const State mixed{a, b, c, d, e, f, g, h};
        for (std::size_t place = 0; place < state.size(); ++place) {
            state[place] += mixed[place];
        }
    }
}

Chosen chosen() noexcept {
#if defined(INVARICLIP_SHA_NI)
    if (has_sha()) {
        return {absorb_fast, "sha-ni"};
    }
#elif defined(INVARICLIP_SHA_ARMV8)
    if (has_sha()) {
        return {absorb_fast, "armv8"};
    }
#endif
    return {absorb_portable, "portable"};
}

}  // namespace invariclip::sha256
