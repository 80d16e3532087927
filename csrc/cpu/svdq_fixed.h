// What svdq_planes.h multiplies by: group scales as integers times a power of two of the channel, and code * scale as two
// planes of bytes.
#pragma once
#if defined(__AMX_INT8__)
#include <immintrin.h>

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/svdq.h"

namespace triskele::TRISKELE_LEVEL::svdq {

constexpr int64_t kSideRows = 16;                 // tokens, or channels, of a tile
constexpr int64_t kSumWords = 256;                // int32 of a tile
constexpr int64_t kTileColumns = 64;              // of K in a tile
constexpr int64_t kCodeBytes = 1024;              // of a tile of codes
constexpr int64_t kBlockTokens = 256;
constexpr int64_t kSegment = 48;                  // tiles of K, or a group's
constexpr int64_t kStretch = 16;                  // the same
constexpr int64_t kMostColumns = 1 << 16;         // 2^16 * 128 * 127 < 2^31, and 2^16 * 2^12 * 12 * 127 / 256 too
constexpr int64_t kMostGroup = 256;               // 256 * 12 * 127 * 2719 < 2^31, as 256 * 8 * 127 * 4079
constexpr int64_t kFewTokens = 6;                 // below, one plane of bytes and integer scales (multiply_few)

// ---- scales -> integers --------------------------------------------------------------------------------------------

// Of all channels, in blocks of 16 lanes; channels beyond N repeat the last one.
struct FixedScales {
  Buffer<Ints> quotients;        // [ceil(N / 16), G]: q in both halves of a lane
  Buffer<Floats> units;          // [ceil(N / 16)]: 2^e
  std::vector<uint8_t> exact;    // [ceil(N / 256)]
};

inline Floats power_of_two(const Ints& exponent) { return (Floats)((exponent + 127) << 23); }

// One block of channels; false where a channel's scales are too far apart, or not finite. `turned` [G]: scratch.
inline bool fix_scales(const Gemm& p, int64_t first, Ints* turned, Ints* quotients, Floats* unit) {
  const uint8_t* rows[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    rows[lane] = reinterpret_cast<const uint8_t*>(p.wscales + std::min(first + lane, p.n - 1) * p.groups);
  constexpr int32_t none = 1 << 20;
  Ints lowest = Ints{} + none, most{};  // exponent of the lowest bit set in any scale; the largest magnitude's bits
  for (int64_t from = 0; from < p.groups; from += kLanes) {
    const int64_t count = std::min(kLanes, p.groups - from);
    Ints part[kLanes];
    transpose(rows, 4 * from, count, part);
    for (int64_t g = 0; g < count; ++g) {
      turned[from + g] = part[g];
      const Ints bits = part[g] & 0x7fffffff;
      const Ints significand = (bits & 0x7fffff) | 0x800000;
      // the lowest bit of the significand as a float holds its place in its exponent
      const Ints place = (((Ints)__builtin_convertvector(significand & -significand, Floats)) >> 23) - 127;
      const Ints exponent = bits == 0 ? Ints{} + none : (bits >> 23) - 150 + place;
      lowest = lowest < exponent ? lowest : exponent;
      most = most > bits ? most : bits;
    }
  }
  lowest = lowest == none ? Ints{} : lowest;
  // a subnormal scale has an exponent below -120 here; 2^e, its inverse and the output's factor are normal
  const Ints inside = (most < 0x7f800000) & (lowest >= -120) & (lowest <= 100);
  const Floats inverse = power_of_two(inside ? -lowest : Ints{});
  const float limit = p.e2m1 ? 2719.f : 4079.f;  // times the largest code, 12 or 8, at most 32639
  const Ints fits = inside & ((Floats)most * inverse <= limit);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    if (fits[lane] == 0) return false;
  *unit = power_of_two(lowest) * (p.e2m1 ? 0.5f : 1.f);
  for (int64_t g = 0; g < p.groups; ++g) {
    const Ints q = __builtin_convertvector((Floats)turned[g] * inverse, Ints);
    quotients[g] = (q & 0xffff) | (q << 16);
  }
  return true;
}

inline bool planes_pay(const Gemm& p) {
  return p.group % kTileColumns == 0 && p.group <= kMostGroup && p.padded <= kMostColumns;
}

inline FixedScales fix_all_scales(const Gemm& p) {
  const int64_t blocks = (p.n + kLanes - 1) / kLanes, granules = (p.n + kGranule - 1) / kGranule;
  FixedScales out{buffer<Ints>(blocks * p.groups), buffer<Floats>(blocks), std::vector<uint8_t>(granules)};
  torch::stable::parallel_for(0, granules, 1, [&](int64_t begin, int64_t end) {
    const Buffer<Ints> turned = buffer<Ints>(p.groups);
    for (int64_t granule = begin; granule < end; ++granule) {
      bool exact = true;
      const int64_t last = std::min(blocks, (granule + 1) * kGranule / kLanes);
      for (int64_t block = granule * kGranule / kLanes; block < last && exact; ++block)
        exact = fix_scales(p, block * kLanes, turned.get(), out.quotients.get() + block * p.groups,
                           out.units.get() + block);
      out.exact[granule] = exact;
    }
  });
  return out;
}

// ---- weights -> two planes of bytes ----------------------------------------------------------------------------

typedef int16_t Shorts __attribute__((vector_size(64)));

// Packed words -> codes of nibbles 0 and 2, 4 and 6 (even columns) and of 1 and 3, 5 and 7 (odd), in pairs by lane.
inline void split_codes(const Ints& packed, bool e2m1, Shorts (&codes)[4]) {
  if (e2m1) {
    const Shorts even = (Shorts)widened<false>(packed & 0x0f0f0f0f, true);
    const Shorts odd = (Shorts)widened<false>((packed >> 4) & 0x0f0f0f0f, true);
    codes[0] = (Shorts)(even << 8) >> 8, codes[1] = even >> 8;
    codes[2] = (Shorts)(odd << 8) >> 8, codes[3] = odd >> 8;
  } else {
    const Shorts word = (Shorts)packed;
    codes[0] = (Shorts)(word << 12) >> 12, codes[1] = (Shorts)(word << 4) >> 12;
    codes[2] = (Shorts)(word << 8) >> 12, codes[3] = word >> 12;
  }
}

// Two columns' weights of 16 bits -> their high bytes, and a tile further their low bytes.
inline void split_bytes(const Shorts& left, const Shorts& right, uint32_t* planes) {
  // the low bytes of both, in turns; one further, the high ones
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  constexpr Bytes lows = {
      0,  64, 2,  66, 4,  68,  6,  70,  8,  72,  10, 74,  12, 76,  14, 78,  16, 80,  18, 82,  20, 84,
      22, 86, 24, 88, 26, 90,  28, 92,  30, 94,  32, 96,  34, 98,  36, 100, 38, 102, 40, 104, 42, 106,
      44, 108, 46, 110, 48, 112, 50, 114, 52, 116, 54, 118, 56, 120, 58, 122, 60, 124, 62, 126};
  const __m512i low = _mm512_permutex2var_epi8((__m512i)left, (__m512i)lows, (__m512i)right);
  const __m512i high = _mm512_permutex2var_epi8((__m512i)(left + 128), (__m512i)(lows + 1), (__m512i)(right + 128));
  std::memcpy(planes, &high, sizeof(high));
  std::memcpy(planes + kSumWords, &low, sizeof(low));
}

// planes [tiles of 64 columns, 2, 16, 16] words: high and low bytes of code * q, for the block's tiles [from, to) of K.
// Within a group come its even columns, then the odd ones.
inline void fill_planes(const Gemm& p, int64_t first, int64_t from, int64_t to, const Ints* quotients, bool fetch,
                        uint32_t* planes) {
  const uint8_t* rows[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    rows[lane] = p.qweight + std::min(first + lane, p.n - 1) * (p.padded / 2);
  const int64_t words_a_group = p.group / 8;  // packed; each gives 4 even and 4 odd columns
  const int64_t begin = from * (kTileColumns / 8), end = to * (kTileColumns / 8);
  const int64_t next_block = end < p.padded / 8 ? 0 : kLanes * (p.padded / 2) - p.padded / 2;
  for (int64_t word = begin; word < end; word += kLanes) {
    const int64_t count = std::min(kLanes, end - word);
    // few tokens pass too quickly for fetch_weights to be in time
    const int64_t ahead = 4 * word + kAhead, skip = ahead < 4 * end ? 0 : next_block;
    for (int64_t lane = 0; lane < kLanes && fetch; ++lane) __builtin_prefetch(rows[lane] + ahead + skip);
    Ints packed[kLanes];
    transpose(rows, 4 * word, count, packed);
    for (int64_t half = 0; half < count; half += 8) {  // 64 columns of one group
      const int64_t g = (word + half) / words_a_group, within = word + half - g * words_a_group;
      const int64_t even = 2 * g * words_a_group + within - 2 * begin;  // rows of B tiles from the stretch's start
      const Shorts q = (Shorts)quotients[g];
      const auto at = [&](int64_t place) { return planes + (place & -16) * 32 + (place & 15) * kLanes; };
      uint32_t *to_even = at(even), *to_odd = at(even + words_a_group);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        Shorts codes[4];
        split_codes(packed[half + i], p.e2m1, codes);
        split_bytes(codes[0] * q, codes[1] * q, to_even + i * kLanes);
        split_bytes(codes[2] * q, codes[3] * q, to_odd + i * kLanes);
      }
    }
  }
}

// The packed weights of the block's tiles [from, to) of K towards L2; one of `parts` parts of them.
inline void fetch_weights(const Gemm& p, int64_t first, int64_t from, int64_t to, int64_t part, int64_t parts) {
  const int64_t lines = ((to - from) * kTileColumns / 2 + 63) / 64, all = kLanes * lines;
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
    const int64_t channel = std::min(first + i / lines, p.n - 1);
    __builtin_prefetch(p.qweight + channel * (p.padded / 2) + from * kTileColumns / 2 + i % lines * 64, 0, 2);
  }
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
