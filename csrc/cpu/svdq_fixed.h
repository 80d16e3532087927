// What svdq_planes.h multiplies by: group scales as integers times a power of two of the channel, and code * scale as
// two planes of bytes, or as one where it fits.
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
constexpr int64_t kBytesColumns = 1 << 15;        // 2^15 * 127 * 127 * 7 < 2^32
constexpr int64_t kStreamBytes = 2 << 20;          // of output: an L2
constexpr int64_t kFewTokens = 6;                 // below, one plane of bytes and integer scales (multiply_few)

typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t Residues __attribute__((vector_size(64)));  // modulo 2^16

// ---- scales -> integers --------------------------------------------------------------------------------------------

enum Way : uint8_t { kFloats, kPlanes, kBytes };  // how a granule is multiplied: with float sums, two planes, one

// Of all channels, in blocks of 16 lanes; channels beyond N repeat the last one.
struct FixedScales {
  Buffer<Ints> quotients;     // [ceil(N / 16), G]: q in both halves of a lane; q / t where the way is kBytes
  Buffer<Floats> units;       // [ceil(N / 16)]: 2^e
  Buffer<Floats> divisors;    // [ceil(N / 16)]: t, where the way is kBytes
  std::vector<uint8_t> ways;  // [ceil(N / 256)]
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

// Few tokens take neither plane, and the float of a sum must be exact in its high part for both ways to agree.
inline bool bytes_pay(const Gemm& p) { return p.m >= kFewTokens && p.padded <= kBytesColumns; }

// The inverses of 1, 3, 5 and 7 modulo 2^16: a product with one is the quotient, or, where there is a remainder, no
// number as small as those that are looked for.
constexpr uint16_t kDivisors[] = {1, 3, 5, 7}, kInverses[] = {1, 43691, 52429, 28087};

// Whether the code -8 is among nibbles; a multiple of 32 bytes.
inline bool has_lowest(const uint8_t* packed, int64_t bytes) {
  typedef uint64_t Nibbles __attribute__((vector_size(32)));
  Nibbles none = ~Nibbles{};  // the upper bit of each nibble stays while it is not 8
  for (int64_t i = 0; i < bytes; i += 32) {
    const Nibbles rest = load<Nibbles>(packed + i) ^ 0x8888888888888888;
    none &= ((rest & 0x7777777777777777) + 0x7777777777777777) | rest;
  }
  const Nibbles found = ~none & 0x8888888888888888;
  return (found[0] | found[1] | found[2] | found[3]) != 0;
}

// Whether code * q / t fits a signed byte for all channels of the blocks [first, last), each channel with a t of its
// own that divides all its q; they are divided then. The code -8, which the quantizer never writes, is looked for only
// in the groups where it would not fit.
inline bool fit_bytes(const Gemm& p, int64_t first, int64_t last, FixedScales& scales) {
  const uint16_t limit = p.e2m1 ? 10 : 18, twice = 2 * limit;
  Residues inverses[kGranule / kLanes], divisors[kGranule / kLanes];
  for (int64_t block = first; block < last; ++block) {
    const Ints* quotients = scales.quotients.get() + block * p.groups;
    Residues most[4] = {};  // of q / t + limit: a negative one counts as very large
    for (int64_t g = 0; g < p.groups; ++g)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Residues shifted = (Residues)quotients[g] * kInverses[i] + limit;
        most[i] = most[i] > shifted ? most[i] : shifted;
      }
    Residues inverse{}, divisor{};
    for (int i = 0; i < 4; ++i) {
      const Residues fits = (Residues)(most[i] <= twice);
      inverse = (fits & kInverses[i]) | (~fits & inverse), divisor = (fits & kDivisors[i]) | (~fits & divisor);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane)
      if (divisor[2 * lane] == 0) return false;
    inverses[block - first] = inverse, divisors[block - first] = divisor;
  }
  std::vector<const uint8_t*> doubtful;
  doubtful.reserve(2 * kGranule);
  for (int64_t block = first; block < last; ++block) {
    Ints* quotients = scales.quotients.get() + block * p.groups;
    for (int64_t g = 0; g < p.groups; ++g) {
      const Shorts q = (Shorts)((Residues)quotients[g] * inverses[block - first]);
      quotients[g] = (Ints)q;
      const Ints doubts = (Ints)((q > 16) | (q < -15));
      const __mmask16 mask = p.e2m1 ? 0 : _mm512_test_epi32_mask((__m512i)doubts, (__m512i)doubts);
      for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
        const int64_t channel = std::min(block * kLanes + __builtin_ctz(lanes), p.n - 1);
        doubtful.push_back(p.qweight + (channel * p.groups + g) * (p.group / 2));
        __builtin_prefetch(doubtful.back());
      }
    }
    scales.divisors[block] = __builtin_convertvector((Ints)divisors[block - first] & 7, Floats);
  }
  bool fits = true;
  for (size_t i = 0; i < doubtful.size() && fits; ++i) fits = !has_lowest(doubtful[i], p.group / 2);
  for (int64_t block = first; block < last && !fits; ++block)  // as they were
    for (int64_t g = 0; g < p.groups; ++g) {
      Ints& q = scales.quotients[block * p.groups + g];
      q = (Ints)((Residues)q * divisors[block - first]);
    }
  return fits;
}

inline bool planes_pay(const Gemm& p) {
  return p.group % kTileColumns == 0 && p.group <= kMostGroup && p.padded <= kMostColumns;
}

inline FixedScales fix_all_scales(const Gemm& p) {
  const int64_t blocks = (p.n + kLanes - 1) / kLanes, granules = (p.n + kGranule - 1) / kGranule;
  FixedScales out{buffer<Ints>(blocks * p.groups), buffer<Floats>(blocks), buffer<Floats>(blocks),
                  std::vector<uint8_t>(granules)};
  torch::stable::parallel_for(0, granules, 1, [&](int64_t begin, int64_t end) {
    const Buffer<Ints> turned = buffer<Ints>(p.groups);
    for (int64_t granule = begin; granule < end; ++granule) {
      bool exact = true;
      const int64_t first = granule * kGranule / kLanes, last = std::min(blocks, first + kGranule / kLanes);
      for (int64_t block = first; block < last && exact; ++block)
        exact = fix_scales(p, block * kLanes, turned.get(), out.quotients.get() + block * p.groups,
                           out.units.get() + block);
      out.ways[granule] = !exact ? kFloats : bytes_pay(p) && fit_bytes(p, first, last, out) ? kBytes : kPlanes;
    }
  });
  return out;
}

// ---- weights -> two planes of bytes ----------------------------------------------------------------------------

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

// Four columns' bytes of code + offset in each lane -> bytes of code * q. Both bytes of a half are multiplied at once;
// with 128 added no byte borrows from the next. `shift` is 0x8080 - 257 * offset * q.
inline void put_bytes(const Ints& codes, const Residues& q, const Residues& shift, uint32_t* to) {
  const Ints bytes = (Ints)((Residues)codes * q + shift) ^ static_cast<int32_t>(0x80808080);
  std::memcpy(to, &bytes, sizeof(bytes));
}

// planes [tiles of 64 columns, 2, 16, 16] words: high and low bytes of code * q, for the block's tiles [from, to) of K;
// with `Bytes` the one plane that is enough, at [tiles, 0]. Within a group come its even columns, then the odd ones.
template <bool Bytes>
inline void fill_planes(const Gemm& p, int64_t first, int64_t from, int64_t to, const Ints* quotients, bool fetch,
                        uint32_t* planes) {
  const uint8_t* rows[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    rows[lane] = p.qweight + std::min(first + lane, p.n - 1) * (p.padded / 2);
  const int64_t words_a_group = p.group / 8;  // packed; each gives 4 even and 4 odd columns
  const uint16_t offset = 257 * (p.e2m1 ? 12 : 8), middle = 0x8080;
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
      const Residues factor = (Residues)q, shift = middle - factor * offset;
      const auto at = [&](int64_t place) { return planes + (place & -16) * 32 + (place & 15) * kLanes; };
      uint32_t *to_even = at(even), *to_odd = at(even + words_a_group);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        if constexpr (Bytes) {
          put_bytes(widened<true>(packed[half + i] & 0x0f0f0f0f, p.e2m1), factor, shift, to_even + i * kLanes);
          put_bytes(widened<true>((packed[half + i] >> 4) & 0x0f0f0f0f, p.e2m1), factor, shift, to_odd + i * kLanes);
        } else {
          Shorts codes[4];
          split_codes(packed[half + i], p.e2m1, codes);
          split_bytes(codes[0] * q, codes[1] * q, to_even + i * kLanes);
          split_bytes(codes[2] * q, codes[3] * q, to_odd + i * kLanes);
        }
      }
    }
  }
}

// The packed weights of `channels` channels' tiles [from, to) of K towards L2; one of `parts` parts of them.
inline void fetch_weights(const Gemm& p, int64_t first, int64_t channels, int64_t from, int64_t to, int64_t part,
                          int64_t parts) {
  const int64_t lines = ((to - from) * kTileColumns / 2 + 63) / 64, all = channels * lines;
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
    const int64_t channel = std::min(first + i / lines, p.n - 1);
    __builtin_prefetch(p.qweight + channel * (p.padded / 2) + from * kTileColumns / 2 + i % lines * 64, 0, 2);
  }
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
#endif
